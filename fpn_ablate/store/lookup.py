"""Find finished runs on the disk."""

from pathlib import Path
from typing import Any

from fpn_ablate.store import record
from fpn_ablate.store.layout import REQUIRED


def find_run(out: str | Path, seed: int, fingerprint: str) -> Path | None:
    """Find the folder of a finished run below `out`, in any table, with all its required files."""
    for folder in sorted(Path(out, "runs").glob(f"*/*/*/seed{seed}-{fingerprint[:8]}")):
        if is_finished(record.read(folder), fingerprint) and all((folder / name).exists() for name in REQUIRED):
            return folder
    return None


def is_finished(content: dict[str, Any] | None, fingerprint: str) -> bool:
    """Return whether a record says that the run of this fingerprint is finished."""
    return bool(content) and content.get("status") == "finished" and content.get("fingerprint") == fingerprint

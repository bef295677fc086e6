"""Find finished runs on the disk."""

from pathlib import Path
from typing import Any

from fpn_ablate.store import record
from fpn_ablate.store.layout import KEPT


def find_run(out: str | Path, seed: int, fingerprint: str) -> Path | None:
    """The folder of a finished run of a cell below `out`, in whatever table it stands, with all that it has made."""
    for folder in sorted(Path(out, "runs").glob(f"*/*/*/seed{seed}-{fingerprint[:8]}")):
        if is_finished(record.read(folder), fingerprint) and all((folder / name).exists() for name in KEPT):
            return folder
    return None


def is_finished(known: dict[str, Any] | None, fingerprint: str) -> bool:
    return bool(known) and known.get("status") == "finished" and known.get("fingerprint") == fingerprint

"""Skip rewriting tables, plots and page when their inputs are unchanged: plots and page take seconds.

`mark_written` saves the digest of the inputs, and the state of each written file, in `<out>/runs/.written.json`.
"""

import json
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from fpn_ablate.store import plan
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.files import UNREADABLE, save_text
from fpn_ablate.utils.hashing import digest
from fpn_ablate.utils.paths import PACKAGE, PICTURES, RECORD, SKIP

MARKER = ".written.json"  # below the folder of all runs
# Files in a run's folder that no table or page reads; they may be written after the sweep has ended.
_IGNORED = ("wandb", SKIP, ".")


def source_digest(runs: Path, experiments: Iterable[Path]) -> str | None:
    """Hash the state of what tables and page are made from; None while a sweep is running, whose progress the page shows."""
    if plan.active_plans(runs):
        return None
    files = [file for file in runs.glob("*/*/*/*/*") if not file.name.startswith(_IGNORED)]
    files += [*runs.rglob(RECORD), *(runs / PICTURES).rglob("*")]
    files += [file for folder in experiments for file in folder.glob("*.yaml")]
    files += [file for file in PACKAGE.rglob("*") if "__pycache__" not in file.parts]  # other processes write there
    drawing = [f"{name} {metadata.version(name)}" for name in ("numpy", "pandas", "scipy", "matplotlib", "vl-convert-python")]
    return digest([_states(files), drawing])


def is_written(runs: Path, sources: str | None) -> bool:
    """Return True if all files written from these sources (a digest) are still as they were."""
    with suppress(*UNREADABLE):
        marker = json.loads((runs / MARKER).read_text())
        return sources is not None and marker == {"sources": sources, "files": _states(map(Path, marker["files"]))}
    return False


def mark_written(runs: Path, sources: str | None, written: Iterable[Path]) -> None:
    """Save that these files were written from these sources. Raises nothing: the marker only saves time."""
    with suppress(UserError, *UNREADABLE):
        if sources is not None:
            files = _states(file.resolve() for file in written)
            save_text(runs / MARKER, json.dumps({"sources": sources, "files": files}, indent=1) + "\n")


def _states(files: Iterable[Path]) -> dict[str, list[int]]:
    """Return size and time of change of each file that is there: other processes may replace and remove some."""
    states = {}
    for file in sorted(map(str, files)):
        with suppress(OSError):
            found = os.stat(file)
            if stat.S_ISREG(found.st_mode):
                states[file] = [found.st_size, found.st_mtime_ns]
    return states

"""Skip rewriting tables, plots and page when their inputs are unchanged: plots and page take seconds.

`mark_written` saves the digest of the inputs and that of each written file below `<out>/runs/.written/`.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fpn_ablate.store import plan
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.files import UNREADABLE, save_text
from fpn_ablate.utils.hashing import digest
from fpn_ablate.utils.paths import PACKAGE, PICTURES, RECORD, SKIP

MARKERS = ".written"  # below the folder of all runs
MAX_MARKERS = 20
# The packages that compute and draw.
_PACKAGES = ("numpy", "pandas", "scipy", "matplotlib", "vl-convert-python", "jinja2", "rich")
# Files in a run's folder that no table or page reads; they may be written after the sweep has ended.
_IGNORED = ("wandb", SKIP, ".")


def source_digest(runs: Path, experiments: Iterable[Path]) -> str | None:
    """Hash all that tables and page are made from; None while a sweep is running, whose progress the page shows."""
    if plan.active_plans(runs):
        return None
    files = [file for file in runs.glob("*/*/*/*/*") if file.is_file() and not file.name.startswith(_IGNORED)]
    files += [*runs.rglob(RECORD), *(file for file in (runs / PICTURES).rglob("*") if file.is_file())]
    states = sorted({(str(file), s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for file in files for s in [file.stat()]})
    definitions = [(str(file), _sha(file)) for folder in experiments for file in sorted(folder.glob("*.yaml"))]
    return digest([states, definitions, _program()])


def is_written(runs: Path, sources: str | None) -> bool:
    """Return True if all files written from these sources (a digest) are still as they were."""
    with suppress(*UNREADABLE):
        if sources is not None:
            return all(_sha(Path(file)) == sha for file, sha in json.loads(_marker(runs, sources).read_text()).items())
    return False


def mark_written(runs: Path, sources: str | None, written: Iterable[Path]) -> None:
    """Save that these files were written from these sources. Raises nothing: the marker only saves time."""
    with suppress(UserError, *UNREADABLE):
        if sources is not None:
            text = json.dumps({str(file.resolve()): _sha(file) for file in written}, indent=1) + "\n"
            save_text(_marker(runs, sources), text)
            for old in sorted((runs / MARKERS).glob("*.json"), key=os.path.getmtime)[:-MAX_MARKERS]:
                old.unlink()


def _marker(runs: Path, sources: str) -> Path:
    return runs / MARKERS / f"{sources}.json"


def _sha(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@lru_cache
def _program() -> list[str]:
    """Hash each file of the package, templates included, and name the versions of the packages that it draws with."""
    files = sorted(file for file in PACKAGE.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return [*map(_sha, files), *map(_version, _PACKAGES)]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""

"""Whether what a sweep's end writes lies there already, made from the same: plots and a page take seconds, and are then left.

Who has written all of it leaves a digest of what it was made from, and of each file (`leave`), below `<out>/runs/.written/`.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fpn_ablate.runs import skip
from fpn_ablate.store import plan
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.files import UNREADABLE, save_text
from fpn_ablate.utils.hashing import digest
from fpn_ablate.utils.paths import PACKAGE, PICTURES, RECORD

FOLDER = ".written"  # below the folder of all runs
KEPT = 20  # words of as many sweeps
# What draws, and what counts.
_PACKAGES = ("numpy", "pandas", "scipy", "matplotlib", "altair", "vl-convert-python", "jinja2", "rich")
# In a run's folder, and nothing to a table or a page: who leaves these may do so after the sweep has ended.
_ELSEWHERE = ("wandb", skip.FILE, ".")


def source_digest(runs: Path, experiments: Iterable[Path]) -> str | None:
    """A digest of all that tables and page are made from; None while a sweep is under way, whose progress the page shows."""
    if plan.active_plans(runs):
        return None
    files = [file for file in runs.glob("*/*/*/*/*") if file.is_file() and not file.name.startswith(_ELSEWHERE)]
    files += [*runs.rglob(RECORD), *(file for file in (runs / PICTURES).rglob("*") if file.is_file())]
    states = sorted({(str(file), s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for file in files for s in [file.stat()]})
    definitions = [(str(file), _sha(file)) for folder in experiments for file in sorted(folder.glob("*.yaml"))]
    return digest([states, definitions, _program()])


def is_written(runs: Path, made: str | None) -> bool:
    """Whether all of it is there as it was left."""
    with suppress(*UNREADABLE):
        return made is not None and all(_sha(Path(f)) == sha for f, sha in json.loads(_marker(runs, made).read_text()).items())
    return False


def mark_written(runs: Path, made: str | None, written: Iterable[Path]) -> None:
    """Raises nothing: it only saves time."""
    with suppress(UserError, *UNREADABLE):
        if made is not None:
            text = json.dumps({str(file.resolve()): _sha(file) for file in written}, indent=1) + "\n"
            save_text(_marker(runs, made), text)
            for old in sorted((runs / FOLDER).glob("*.json"), key=os.path.getmtime)[:-KEPT]:
                old.unlink()


def _marker(runs: Path, made: str) -> Path:
    return runs / FOLDER / f"{made}.json"


def _sha(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@lru_cache
def _program() -> list[str]:
    """The package to the last letter, with its templates, and the versions of the packages that it draws with."""
    files = sorted(file for file in PACKAGE.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return [*map(_sha, files), *map(_version, _PACKAGES)]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""

"""Find what can be removed below `out` and in the user's cache: what killed runs left, unfinished runs, caches."""

import errno
import shutil
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from fpn_ablate.store import record
from fpn_ablate.store.layout import LOCKS
from fpn_ablate.utils.content import cache_folder
from fpn_ablate.utils.files import TEMPORARY, leads_out
from fpn_ablate.utils.locks import is_free, lock
from fpn_ablate.utils.paths import CONFIG, ERROR

KINDS = ("leftovers", "unfinished", "cache", "finished")
RECENT = 3600.0  # seconds in which a file may still be in use
DAY = 86400.0
RESUME = ("checkpoint.pt", "checkpoint-4.pt", "step3.pt", ERROR)  # what a finished run no longer needs


@dataclass(frozen=True)
class Item:
    """A file or a folder that can be removed, why, its size in bytes and the days since anything in it was written.

    `lock_file`: the lock that a process holds which works on it; None if there is none.
    """

    kind: str
    path: Path
    reason: str
    size: int
    days: float
    lock_file: Path | None = None

    def remove(self) -> None:
        """Remove it. Raises OSError if that is not possible, or a process has begun to work on it since it was listed."""
        with lock(self.lock_file, timeout=0) if self.lock_file else nullcontext():
            if _age_and_size(self.kind, self.path)[0] < self.days:
                raise BlockingIOError(errno.EBUSY, "written since it was listed")
            if self.path.is_dir() and not self.path.is_symlink():
                shutil.rmtree(self.path)
            else:
                self.path.unlink(missing_ok=True)


def find(out: Path, older: float) -> list[Item]:
    """List everything that can be removed: runs and caches in which nothing was written for `older` days, and leftovers."""
    items = [*_of_runs(out, older), *_of_pretraining(out, older), *_of_cache(older)]
    return sorted(items, key=lambda item: (KINDS.index(item.kind), str(item.path)))


def _of_runs(out: Path, older: float) -> Iterator[Item]:
    for file in sorted((out / "runs").glob(f"*/*/*/*/{CONFIG}")):
        folder = file.parent
        content = record.read(folder) or {}
        held = out / "runs" / LOCKS / str(content.get("fingerprint", folder.name))
        if leads_out(out, folder) or not is_free(held):
            continue
        status = str(content.get("status", "without a record"))
        finished = status == "finished"
        item = _item("finished" if finished else "unfinished", folder, f"{status}, untouched", held)
        if item.days >= older:
            yield item
        if finished or item.days < older:
            names = [name for name in RESUME if finished and (folder / name).exists()]
            for path in (*(folder / name for name in names), *folder.glob(TEMPORARY)):
                leftover = _item("leftovers", path, "left by a killed process", held)
                if leftover.days * DAY >= RECENT:
                    yield leftover


def _of_pretraining(out: Path, older: float) -> Iterator[Item]:
    for path in (out / "backbones").glob("*-checkpoint.pt"):
        held = path.with_name(path.name.replace("-checkpoint.pt", ".pt.lock"))
        item = _item("unfinished", path, "interrupted pre-training, untouched", held)
        if item.days >= older and is_free(held):
            yield item


def _of_cache(older: float) -> Iterator[Item]:
    for path in cache_folder().glob("shapes/*"):
        item = _item("cache", path, "generated pictures, rendered again when needed; unused")
        if path.suffix != ".lock" and path.is_file() and item.days >= older and item.days * DAY >= RECENT:
            yield item


def _item(kind: str, path: Path, reason: str, held: Path | None = None) -> Item:
    days, size = _age_and_size(kind, path)
    return Item(kind, path, reason, size, days, held)


def _age_and_size(kind: str, path: Path) -> tuple[float, int]:
    """Return the days since anything in a file or folder was written, or read if it is in a cache, and its size in bytes."""
    files = [file for file in path.rglob("*") if not file.is_dir()] if path.is_dir() and not path.is_symlink() else [path]
    states = [file.lstat() for file in files or [path]]  # removing a leftover is no use of its folder
    newest = max(max(state.st_mtime, state.st_atime if kind == "cache" else 0) for state in states)
    return max(0.0, (time.time() - newest) / DAY), sum(state.st_size for state in states)


def remove_empty_parents(path: Path, root: Path) -> None:
    """Remove the folders between `path` and `root` that are empty now."""
    for parent in path.parents:
        if not parent.is_relative_to(root) or parent in (root, root / "runs") or any(parent.iterdir()):
            break
        parent.rmdir()

"""One process at a time, on one machine or on several that share a folder.

A lock is the kernel's (flock on a file that stays where it is), so it is gone with the process that holds it, whatever that
died of, and nothing has to be cleared away. What is assumed of a network file system:

- flock holds between machines (NFS 4, NFS 3 with lockd, Lustre mounted with `flock`, CephFS, GPFS); where it holds on each
  machine alone, two machines may train the same cell, whose files are then those of the one that ended last;
- a rename replaces a file in one piece;
- what was closed on one machine is seen by another that opens it afterwards, also where it was absent before: NFS remembers for
  up to a minute that a file is absent unless it is mounted with `lookupcache=positive`.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path

from filelock import FileLock, Timeout

from fpn_ablate.utils.console import log_line
from fpn_ablate.utils.errors import UserError

# From its version 4 on filelock would take, in silence, a file that outlives its process where the kernel has no locks.
_NO_OTHER = {"fallback_to_soft": False} if "fallback_to_soft" in signature(FileLock.__init__).parameters else {}


def lock(path: Path, timeout: float = -1) -> FileLock:
    """A lock to be held by `with`, which raises `filelock.Timeout` after so many seconds (-1: never)."""
    return FileLock(path, timeout=timeout, **_NO_OTHER)


@contextmanager
def exclusive(path: Path, what: str) -> Iterator[None]:
    """Hold the lock `path`; waits, and says so, while another process is at `what`.

    Raises:
        UserError: the file system has no locks.
    """
    own = lock(path)
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            own.acquire(timeout=0)
        except Timeout:
            log_line(f"{what}: another process is at it, waiting for that", sys.stderr)
            own.acquire()
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: cannot be locked ({reason}); give out=FOLDER on a disk that has locks (flock)") from None
    try:
        yield
    finally:
        own.release()

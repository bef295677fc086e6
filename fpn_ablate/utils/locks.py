"""File locks between processes, on one machine or on several that share a folder.

A lock is the kernel's (flock on a file that stays as long as a process may wait for it): it ends with the process that holds
it, however that ends, and leaves nothing to clean up. Assumptions about a network file system:

- flock works between machines (NFS 4, NFS 3 with lockd, Lustre mounted with `flock`, CephFS, GPFS). Where it works only within
  a machine, two machines may train the same run; its files are then those of the machine that finished last.
- A rename replaces a file atomically.
- A file closed on one machine is seen by another that opens it afterwards, even if it was absent before. NFS caches for up to a
  minute that a file is absent unless it is mounted with `lookupcache=positive`.
"""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path

from filelock import FileLock, Timeout

from fpn_ablate.utils.console import log_line
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.files import unwritable

# Where the kernel has no locks, filelock >= 4 would silently use a lock file, which outlives its process.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EIO)  # of flock, by file system
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
_UMASK = os.umask(0o077)
os.umask(_UMASK)  # the only way to read it
_KERNEL_ONLY = {"fallback_to_soft": False} if "fallback_to_soft" in signature(FileLock.__init__).parameters else {}


def lock(path: Path, timeout: float = -1) -> FileLock:
    """Make a lock to use in `with`, which raises `filelock.Timeout` after `timeout` seconds (-1: never)."""
    return FileLock(path, timeout=timeout, mode=0o666 & ~_UMASK, **_KERNEL_ONLY)


def is_free(path: Path) -> bool:
    """Return whether no process holds the lock `path`; True as well if it cannot be locked, which `exclusive` explains."""
    try:
        with lock(path, timeout=0):
            return True
    except Timeout:
        return False
    except OSError as error:
        return error.errno not in _UNWRITABLE or not _is_held_by_others(path)


def _is_held_by_others(path: Path) -> bool:
    """Return whether a process of another user, or of a machine that may write there, holds a lock that we may only read."""
    import fcntl  # not on Windows

    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # released as the file is closed
        return False
    except BlockingIOError:
        return True
    except OSError:
        return False


class Held(Exception):
    """Another process holds the lock `path`, which `task` needs."""

    def __init__(self, path: Path, task: str) -> None:
        super().__init__(f"{task}: another row or process is working on it")
        self.path, self.task = path, task


@contextmanager
def exclusive(path: Path, task: str, wait: bool = True) -> Iterator[None]:
    """Hold the lock `path`. While another process holds it, wait and say which `task` is waiting.

    Raises:
        Held: another process holds it, and `wait` is False.
        UserError: the file system has no locks, or the lock's file cannot be written.
    """
    held = lock(path)
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            held.acquire(timeout=0)
        except Timeout:
            problem = Held(path, task)
            if not wait:
                raise problem from None
            log_line(f"{problem}; waiting", sys.stderr)
            held.acquire()
    except (OSError, NotImplementedError) as error:
        if getattr(error, "errno", errno.ENOSYS) not in _NO_LOCKS:
            raise unwritable(path, error) from None
        reason = getattr(error, "strerror", None) or str(error)
        fix = "choose an output folder (out) on a disk that supports flock"
        raise UserError(f"{path}: cannot be locked ({reason}); {fix}") from None
    try:
        yield
    finally:
        held.release()

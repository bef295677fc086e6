"""Files that are whole or not there: written beside, flushed to the disk, then renamed."""

import errno
import lzma
import os
import re
import socket
import struct
import time
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path

from fpn_ablate.utils.errors import UserError

# What reading a file that somebody damaged may raise, whatever its kind.
UNREADABLE = (
    *(OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, EOFError),
    *(RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, MemoryError, ArithmeticError),
    *(SyntaxError, tokenize.TokenError, struct.error),  # of headers: Pillow's and numpy's
)
TEMPORARY = ".*.[0-9]*.*"  # a pattern: what a write that was killed leaves


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary path in the same folder and move the result to `path`.

    Raises:
        UserError: the disk does not take it; what stood at `path` is untouched.
    """
    # A name of its own a process and machine; not mkstemp, whose files nobody else may read (records on a shared disk).
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{socket.gethostname()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _keep_order(path.parent)
    except BaseException as error:
        with suppress(OSError):
            os.truncate(temporary, 0)  # a writer that failed may still have it open, and the record needs the room
        with suppress(OSError):
            temporary.unlink()
        # torch.save tells of a full disk by a RuntimeError from its zip writer.
        full = isinstance(error, RuntimeError) and any(
            word in str(error) for word in ("PytorchStreamWriter", "inline_container")
        )
        if isinstance(error, OSError) or full:
            raise unwritable(path, error) from None
        raise


def save_text(path: Path, text: str) -> None:
    """Replace a file as a whole by `text`, in UTF-8: a reader, or a crash, sees the old text or the new one.

    Raises:
        UserError: as `write_atomically`.
    """
    # A traceback may name a file whose name is no UTF-8.
    write_atomically(path, partial(Path.write_text, data=text, encoding="utf-8", errors="backslashreplace"))


def _keep_order(folder: Path) -> None:
    """After a power loss, too, what was renamed before is there if what is renamed next is: a record says that weights are."""
    with suppress(OSError):  # not every file system syncs folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def clear_leftovers(folders: Iterable[Path], age: float = 3600) -> None:
    """Remove what killed writes of this machine have left directly in these folders; what is younger than `age` seconds may be
    in work. Only what is named exactly so: the folders may hold files of others.
    """
    ours = re.compile(rf"\..+(\.[^.]+)\.\d+-{re.escape(socket.gethostname())}\1")
    for file in (file for folder in folders for file in folder.glob(TEMPORARY)):
        with suppress(OSError):
            if ours.fullmatch(file.name) and time.time() - file.stat().st_mtime > age:
                file.unlink()


def unwritable(path: Path, error: BaseException) -> UserError:
    """What the disk, or a library that writes to it, says of a place, as an error that says what to do about it."""
    number = getattr(error, "errno", None)
    reason = getattr(error, "strerror", None) or "the disk did not take all of it; is it full?"
    if number in (errno.EDQUOT, errno.EFBIG):
        fix = "make room within the quota or the limit, then give the same command again"
    elif number in (errno.ENOSPC, None):
        fix = "make room, then give the same command again"
    elif number in (errno.EROFS, errno.EACCES, errno.EPERM):
        fix = "make it writable, or give another place"
    else:
        fix = "give another place"
    return UserError(f"{path}: cannot be written ({reason}); {fix}")


def safe_name(text: str) -> str:
    """What a table, a recipe or a row is called among folders: letters, digits and . _ + - alone, at most 80, no dot first."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text).lstrip(".")[:80] or "unnamed"

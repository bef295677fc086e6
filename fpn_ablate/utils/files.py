"""Write files atomically: to a temporary file in the same folder, flushed to the disk, then renamed."""

import errno
import lzma
import os
import re
import socket
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from fpn_ablate.utils.errors import UserError

# Exceptions that reading a damaged file of any kind may raise.
UNREADABLE = (
    *(OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, EOFError),
    *(RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, MemoryError, ArithmeticError),
    *(SyntaxError, tokenize.TokenError, struct.error),  # of headers: Pillow's and numpy's
)
MAX_COMPRESSION, MAX_UNPACKED = 100, 10**8  # coordinates hardly compress; constants do, a thousandfold
TEMPORARY = ".*.[0-9]*.*"  # glob pattern of the temporary files that a killed write leaves


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary path in the same folder and move the result to `path`.

    Raises:
        UserError: the disk does not take the file; the old content of `path` is untouched.
    """
    # A name for each process and machine. Not mkstemp: nobody else may read its files, and records lie on shared disks.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{socket.gethostname()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            os.truncate(temporary, 0)  # a failed writer may still hold the file open, and the record needs its space
        with suppress(OSError):
            temporary.unlink()
        # On a full disk torch.save raises a RuntimeError from its zip writer.
        full = isinstance(error, RuntimeError) and any(
            word in str(error) for word in ("PytorchStreamWriter", "inline_container")
        )
        if isinstance(error, OSError) or full:
            raise unwritable(path, error) from None
        raise


def save_text(path: Path, text: str) -> None:
    """Replace a file's content by `text` in UTF-8; readers, also after a crash, see the old text or the new one.

    Raises:
        UserError: as `write_atomically`.
    """
    # `errors`: a traceback may quote a file name that is not valid UTF-8.
    write_atomically(path, partial(Path.write_text, data=text, encoding="utf-8", errors="backslashreplace"))


def _sync_folder(folder: Path) -> None:
    """Flush a rename to the disk before the next one, also against power loss: if a record is there, so are its weights."""
    with suppress(OSError):  # not every file system syncs folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def unwritable(path: Path, error: BaseException) -> UserError:
    """Turn an error of the disk, or of a library that writes to it, into a UserError that names the fix."""
    number = getattr(error, "errno", None)
    reason = getattr(error, "strerror", None) or "the disk did not take all of it; is it full?"
    full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, None)
    fix = "make room, then run the same command again" if full else "make it writable, or choose another path"
    return UserError(f"{path}: cannot be written ({reason}); {fix}")


def refuse_bomb(path: Path, ratio: int, slack: int) -> None:
    """Raise ValueError if a zip archive would unpack to more than `ratio` times its size plus `slack` bytes."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > slack + ratio * path.stat().st_size:
        raise ValueError(f"it unpacks to {unpacked:,} bytes")


def open_arrays(path: Path) -> Any:
    """Open an .npz file to read. It may raise any of UNREADABLE, as its arrays may when they are read."""
    import numpy as np

    refuse_bomb(path, MAX_COMPRESSION, MAX_UNPACKED)
    return np.load(path, allow_pickle=False)


def safe_name(text: str) -> str:
    """Turn the name of a table, recipe or row into a folder name: letters, digits, . _ + - only, at most 80, no leading dot."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text).lstrip(".")[:80] or "unnamed"

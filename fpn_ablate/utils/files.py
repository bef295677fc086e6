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
    """Call `write` with the path of an empty temporary file in the same folder and move the result to `path`.

    A link that somebody has put in the place of the temporary, or of `path`, is replaced and never followed.

    Raises:
        UserError: the disk does not take the file; the old content of `path` is untouched.
    """
    if not path.name:
        raise UserError(f"{path}: give the name of a file")
    # A name for each process and machine. Not mkstemp: nobody else may read its files, and records lie on shared disks.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{socket.gethostname()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # of a killed process with this number
        os.close(open_no_follow(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        write(temporary)
        handle = open_no_follow(temporary, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        temporary.replace(path)
        _sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):  # a failed writer may still hold the file open, and the record needs its space
            os.close(open_no_follow(temporary, os.O_WRONLY | os.O_TRUNC))
        with suppress(OSError):
            temporary.unlink()
        # On a full disk torch.save raises a RuntimeError from its zip writer.
        full = isinstance(error, RuntimeError) and any(
            word in str(error) for word in ("PytorchStreamWriter", "inline_container")
        )
        if isinstance(error, OSError) or full:
            raise unwritable(path, error) from None
        raise


def modified(path: Path) -> float:
    """Return when a file was last written, in seconds since 1970; 0 if it is gone, as another process may have removed it."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def unreadable(path: Path, error: BaseException, reason: str) -> UserError:
    """Return the error for a finished run's file that cannot be read. Only for damaged content it advises to train again."""
    access = isinstance(error, MemoryError | OSError) and not isinstance(error, FileNotFoundError)
    return UserError(f"{path}: cannot be read ({reason})" + ("" if access else "; remove its folder to train the run again"))


def open_no_follow(path: Path | str, flags: int) -> int:
    """Open a file as `os.open` does, with the umask's permissions; OSError if it is a symbolic link. An `opener` for `open`."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def leads_out(out: str | Path, path: Path) -> bool:
    """Return True if a path below the folder `out`, which may be a link itself, leads out of it through a symbolic link."""
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(out))


def refuse_links_out(out: str | Path, *paths: Path) -> None:
    """Check that `paths`, below the folder `out`, lie in it: what is written there must not land elsewhere.

    Raises:
        UserError: one leads out of it (`leads_out`).
    """
    for path in paths:
        if leads_out(out, path):
            raise UserError(f"{path}: a symbolic link that leads out of {out}; put a folder in its place, or give out=FOLDER")


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
    fix = "make it writable, or choose another path"
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, None):
        fix = "make room, then run the same command again"
    elif number in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        fix = "a file is where a folder has to be, or the other way round: move it away, or choose another path"
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

"""Files that are whole or not there: written beside, flushed to the disk, then renamed."""

import errno
import lzma
import os
import re
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from fpn_ablate.errors import UserError

RECORD, METRICS, DETECTIONS, EXHIBITS = "record.json", "metrics.jsonl", "detections.npz", "exhibits.npz"  # in a run's folder
MODEL = "model.pt"  # likewise: its weights
PICTURES, TRUTH = ".pictures", "truth.json"  # below the folder of all runs, and in each folder there
# What reading a file that somebody damaged may raise, whatever its kind.
UNREADABLE = (
    *(OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, EOFError),
    *(RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, MemoryError, ArithmeticError),
    *(SyntaxError, tokenize.TokenError, struct.error),  # of headers: Pillow's and numpy's
)
FORMAT = 1  # of record.json: raised when its keys change their meaning


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary path in the same folder and move the result to `path`.

    Raises:
        UserError: the disk does not take it; what stood at `path` is untouched.
    """
    # A name of its own a process; not mkstemp, whose files nobody else may read (records on a shared disk).
    temporary = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # torch.save tells of a full disk by a RuntimeError from its zip writer.
        full = isinstance(error, RuntimeError) and any(
            word in str(error) for word in ("PytorchStreamWriter", "inline_container")
        )
        if isinstance(error, OSError) or full:
            reason = getattr(error, "strerror", None) or "the disk did not take all of it; is it full?"
            full = full or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, None)
            fix = "make room, then give the same command again" if full else "give another place"
            raise UserError(f"{path}: cannot be written ({reason}); {fix}") from None
        raise


def safe_name(text: str) -> str:
    """What a table, a recipe or a row is called among folders: letters, digits and . _ + - alone, at most 80, no dot first."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text).lstrip(".")[:80] or "unnamed"


def filled(text: str, name: str, body: str) -> str:
    """A document's `text` with `body` between the lines `<!-- name -->` and `<!-- /name -->`.

    Raises:
        UserError: these lines are missing, or are there more than once.
    """
    first, last = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, found, rest = text.partition(first)
    _, closed, after = rest.partition(last)
    if not closed or first in rest:
        raise UserError(
            f"one block '<!-- {name} -->', at the end of its line, with a '{last}' after it, must be in the document"
        )
    return before + found + body + closed + after

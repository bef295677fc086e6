"""Errors that the user can fix: the message names the file, key or value, and the fix."""

import reprlib
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


class UserError(Exception):
    """Bad input. The command line prints only the message; in Python it is an ordinary exception.

    Messages quote names from files: characters that would move a terminal's cursor, or that cannot be encoded, are escaped.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message)))


class Diverged(Exception):
    """A loss is not finite. Ends the run, not the sweep."""


class RankFailed(Exception):
    """Another process of a row on several GPUs has failed, or was killed. The message says which, and why."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's type if the message is empty."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def raising_line(error: BaseException, is_theirs: Callable[[Path], bool]) -> str:
    """Return "FILE, line N: " of the innermost call in a file that `is_theirs`; "" if there is none."""
    calls = [call for call in traceback.extract_tb(error.__traceback__) if is_theirs(Path(call.filename))]
    return f"{calls[-1].filename}, line {calls[-1].lineno}: " if calls else ""


def printable(text: str) -> str:
    """Escape control characters as Python does (\\x1b), except line breaks and tabs."""
    return "".join(char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in text)


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxdict, _REPR.maxlist, _REPR.maxtuple = 4, 8, 8, 8
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = 80


def short_repr(value: Any, limit: int = 80) -> str:
    """Format a value for a message in at most `limit` characters, even a whole file or a structure too deep for repr()."""
    text = _REPR.repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."

"""Errors that are the user's to mend: the message names the file, key or value, and the fix."""

import reprlib
from typing import Any


class UserError(Exception):
    """Bad input. The command line prints the message alone; in Python it is an ordinary exception.

    Names in it come from files: what would move a terminal's cursor, or could not be written at all, stands there escaped.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message)))


class Diverged(Exception):
    """A loss is not finite. Ends the run, not the sweep."""


def first_line(error: BaseException) -> str:
    """What an error of another library says, in a line; its kind where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def printable(text: str) -> str:
    """Text with its control characters, but for line breaks and tabs, as Python writes them: \\x1b."""
    return "".join(char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in text)


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist, _SHORT.maxtuple = 4, 8, 8, 8
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 80


def shown(value: Any, most: int = 80) -> str:
    """A value in a message: short, though it were a whole file, or nested deeper than Python goes."""
    text = _SHORT.repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."

"""Errors that are the user's to mend: the message names the file, key or value, and the fix."""


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
    """Text with its control characters, but for line breaks, as Python writes them: \\x1b."""
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)

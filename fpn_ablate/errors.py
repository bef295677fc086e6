"""Errors that are the user's to mend: the message names the file, key or value, and the fix."""


class UserError(Exception):
    """Bad input. The command line prints the message alone; in Python it is an ordinary exception."""


class Diverged(Exception):
    """A loss is not finite. Ends the run, not the sweep."""


def first_line(error: BaseException) -> str:
    """What an error of another library says, in a line; its kind where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)

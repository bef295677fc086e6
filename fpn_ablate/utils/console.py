"""Print lines for the user. No run fails because the terminal, or the file on a full disk that stands for it, takes none."""

import sys
from contextlib import suppress
from typing import TextIO


def log_line(line: str, stream: TextIO | None = None, end: str = "\n") -> None:
    """Print a line at once, on standard output by default; drop it if it cannot be written."""
    with suppress(OSError):
        print(line, file=stream or sys.stdout, end=end, flush=True)

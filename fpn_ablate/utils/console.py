"""What is told on the terminal, which may be a file on a full disk: nothing that a run does depends on its being told."""

import sys
from contextlib import suppress
from typing import TextIO


def log_line(line: str, stream: TextIO | None = None, end: str = "\n") -> None:
    """Print at once, on standard output unless told otherwise; what cannot be printed is dropped."""
    with suppress(OSError):
        print(line, file=stream or sys.stdout, end=end, flush=True)

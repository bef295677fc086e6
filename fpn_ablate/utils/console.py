"""Print lines for the user. No run fails because the terminal, or the file on a full disk that stands for it, takes none."""

import sys
from contextlib import suppress
from typing import TextIO

COMMAND = "FPN_ABLATE_COMMAND"  # environment variable: the command that the user typed, set for the jobs of a sweep


def log_line(line: str, stream: TextIO | None = None, end: str = "\n") -> None:
    """Print a line at once, on standard output by default; drop it if it cannot be written.

    Characters that the stream's encoding lacks are escaped.
    """
    stream = stream or sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    with suppress(OSError):
        print(line.encode(encoding, "backslashreplace").decode(encoding), file=stream, end=end, flush=True)

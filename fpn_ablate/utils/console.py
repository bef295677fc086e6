"""Print lines for the user. No run fails because the terminal, or the file on a full disk that stands for it, takes none."""

import shutil
import sys
import textwrap
from contextlib import suppress
from typing import TextIO

from fpn_ablate.utils.errors import printable

COMMAND = "FPN_ABLATE_COMMAND"  # environment variable: the command that the user typed, set for the jobs of a sweep


def log_line(line: str, stream: TextIO | None = None, end: str = "\n") -> None:
    """Print a line at once, on standard output by default; drop it if it cannot be written.

    Characters that the stream's encoding lacks are escaped.
    """
    stream = stream or sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    with suppress(OSError):
        print(line.encode(encoding, "backslashreplace").decode(encoding), file=stream, end=end, flush=True)


def log_words(text: str, indent: str = "", stream: TextIO | None = None) -> None:
    """Print a text as `log_line` does, on a terminal broken between words; `indent` stands before its further lines."""
    if (stream or sys.stdout).isatty():
        wrapper = textwrap.TextWrapper(break_long_words=False, break_on_hyphens=False, subsequent_indent=indent)
        wrapper.width = shutil.get_terminal_size().columns
        text = wrapper.fill(text)
    log_line(text, stream)


def literal(text: str) -> str:
    """Escape a text of the user's for rich, so that no part of it is taken for markup or for a control character."""
    from rich.markup import escape

    return escape(printable(text))


def duration(seconds: float) -> str:
    """Write a time as 0:07, 12:30 or 1:02:03."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def coarse_duration(seconds: float) -> str:
    """Write a time in one unit: 40 s, 3 min, 2.5 h."""
    if seconds < 90:
        return f"{max(seconds, 0):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def about(seconds: float) -> str:
    """Write an estimated time: about 40 s, about 3 min, about 2.5 h."""
    return f"about {max(10, round(seconds, -1)):.0f} s" if seconds < 90 else f"about {coarse_duration(seconds)}"

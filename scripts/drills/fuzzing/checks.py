"""Checks of every case, whatever its kind."""

import contextlib
import io
import signal
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

LONGEST = 20_000  # characters of a message


class Lost(AssertionError):
    """A case that ended in none of the allowed ways."""


class Hang(BaseException):
    """A case that takes too long. Not an Exception, so that the tested code does not catch it."""


def check_message(text: str, longest: int = LONGEST) -> None:
    """Check that a message exists, is short enough to read, and cannot move the cursor of a terminal."""
    if not text.strip():
        raise Lost("an empty message")
    if len(text) > longest:
        raise Lost(f"a message of {len(text)} characters: {text[:300]}")
    if controls := {char for char in text if not char.isprintable() and char not in "\n\t"}:
        raise Lost(f"a message with {sorted(map(ascii, controls))}: {text[:300]!a}")


def check_equal(value: Any, expected: Any, name: str) -> None:
    """Raise Lost unless both are equal."""
    if value != expected:
        raise Lost(f"{name}: {ascii(value)[:300]} in place of {ascii(expected)[:300]}")


def run_command(call: Callable[[], int | None]) -> tuple[int | None, str]:
    """Run a command line in this process; return its exit code and output."""
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        try:
            code = call()
        except SystemExit as stop:
            code = stop.code
    return code, stream.getvalue()


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise Hang if the block takes longer."""

    def on_alarm(_: int, frame: FrameType | None) -> None:
        raise Hang(f"more than {seconds:g} s, in {''.join(traceback.format_stack(frame)[-3:])}")

    previous = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)

"""What is asked of each case, whatever its kind."""

import contextlib
import io
import signal
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

LONGEST = 20_000  # characters of a message


class Lost(AssertionError):
    """A case that ends in none of the ways allowed."""


class Hang(BaseException):
    """Not an Exception: nothing that is tested may catch it."""


def told(text: str, longest: int = LONGEST) -> None:
    """A message is there, can be read by a person, and cannot move the cursor of a terminal."""
    if not text.strip():
        raise Lost("an empty message")
    if len(text) > longest:
        raise Lost(f"a message of {len(text)} characters: {text[:300]}")
    if wrong := {char for char in text if not char.isprintable() and char not in "\n\t"}:
        raise Lost(f"a message with {sorted(map(ascii, wrong))}: {text[:300]!a}")


def same(found: Any, expected: Any, what: str) -> None:
    if found != expected:
        raise Lost(f"{what}: {ascii(found)[:300]} in place of {ascii(expected)[:300]}")


def command(call: Callable[[], int | None]) -> tuple[int | None, str]:
    """Exit code and all output of a command line in this process."""
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        try:
            code = call()
        except SystemExit as stop:
            code = stop.code
    return code, stream.getvalue()


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Hang where it takes longer."""

    def over(_: int, frame: FrameType | None) -> None:
        raise Hang(f"more than {seconds:g} s, in {''.join(traceback.format_stack(frame)[-3:])}")

    old = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)

"""Parsers of arguments whose errors are safe to print."""

import argparse
import difflib
from collections.abc import Callable
from typing import NoReturn

from fpn_ablate.utils.errors import printable


class Parser(argparse.ArgumentParser):
    """argparse's. A message names the option that a misspelt one may mean, and its control characters are escaped: it repeats
    what was typed, or pasted."""

    def error(self, message: str) -> NoReturn:
        what, _, unknown = message.partition(": ")
        near = difflib.get_close_matches(unknown, self._option_string_actions, n=1) if what == "unrecognized arguments" else ()
        super().error(printable(message) + (f"; did you mean {near[0]}?" if near else ""))


def at_least(low: int) -> Callable[[str], int]:
    """Return the type of an argument that is a whole number from `low` on."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"{text!r}: give a whole number from {low} on")
        return value

    return parse


def command_parser(command: str, about: str) -> Parser:
    """Return the parser of `python -m fpn_ablate COMMAND`."""
    return Parser(prog=f"python -m fpn_ablate {command}", description=about)

"""Parsers of arguments whose errors are safe to print."""

import argparse
from typing import NoReturn

from fpn_ablate.utils.errors import printable


class Parser(argparse.ArgumentParser):
    """argparse's, with control characters in its messages escaped: they repeat what was typed, or pasted."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def command_parser(command: str, about: str) -> Parser:
    """Return the parser of `python -m fpn_ablate COMMAND`."""
    return Parser(prog=f"python -m fpn_ablate {command}", description=about)

"""Show what each row is before anything is trained: `python -m fpn_ablate verify [key=value ...]`."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fpn_ablate.cli.parser import command_parser
from fpn_ablate.config.rows import compose_rows
from fpn_ablate.sweep.checks import check_parts
from fpn_ablate.utils.blocks import fill_blocks
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.files import save_text

if TYPE_CHECKING:
    from fpn_ablate.model.summary import RowFacts


def main(arguments: Sequence[str], config_dir: Path | None = None) -> int:
    """Print the rows of the task's table, or those of `ablation=ROW,ROW`.

    Raises:
        UserError: bad arguments, or a README without a block to fill.
    """
    options = _options(arguments)
    if options.readme:
        if not options.readme.is_file():
            raise UserError(f"--readme {options.readme}: no such file")
        save_text(options.readme, fill_verify_blocks(options.readme.read_text(encoding="utf-8"), config_dir))
        return 0
    facts = _facts(options, config_dir)

    from fpn_ablate.cli.verify_text import markdown, show

    if options.markdown:
        print(markdown(facts, options.size), end="")
    else:
        show(facts, options.size)
    return 0


def fill_verify_blocks(text: str, config_dir: Path | None = None) -> str:
    """Fill each block `<!-- verify: ARGUMENTS -->` to `<!-- /verify -->` of a README with the Markdown table of its rows.

    Raises:
        UserError: a block is not closed, or there is none.
    """

    def table(arguments: str) -> str:
        from fpn_ablate.cli.verify_text import markdown

        options = _options(arguments.split())
        return markdown(_facts(options, config_dir), options.size)

    return fill_blocks(text, "verify: ARGUMENTS", table)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = command_parser("verify", main.__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for a run; ablation=ROW,ROW chooses rows")
    parser.add_argument("--size", type=_size, default="800x1000", metavar="HxW", help="image size (default: %(default)s)")
    parser.add_argument("--markdown", action="store_true", help="print the cost alone, as a Markdown table in GMAC")
    parser.add_argument(
        "--readme", type=Path, help="fill the '<!-- verify: ARGUMENTS -->' blocks of this file with such tables"
    )
    return parser.parse_intermixed_args(arguments)


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give height x width in pixels, as 800x1024")
    return int(match[1]), int(match[2])


def _facts(options: argparse.Namespace, config_dir: Path | None) -> dict[str, "RowFacts"]:
    """Return the facts of each row; rows that differ in no factor are told apart by the names of their recipes."""
    rows = compose_rows(options.overrides, config_dir)
    for cfg in rows:
        check_parts(cfg)

    from fpn_ablate.model.summary import row_facts  # loads torch, which takes seconds

    unique = len({cfg.row for cfg in rows}) == len(rows)
    return {cfg.row if unique else f"{cfg.row}, {cfg.recipe.name}": row_facts(cfg, size=options.size) for cfg in rows}

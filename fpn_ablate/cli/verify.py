"""Show what each row is before anything is trained: `python -m fpn_ablate verify [key=value ...]`."""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fpn_ablate.cli.parser import command_parser
from fpn_ablate.config.composition import compose_rows
from fpn_ablate.model.summary import CLASSES, PAPER_SIZE, ROIS, RowFacts, row_facts
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.files import save_text

BLOCK = re.compile(r"(?P<open><!-- verify:(?P<arguments>.*?)-->\n)(?P<text>.*?)(?P<close><!-- /verify -->)", re.DOTALL)


def main(arguments: Sequence[str], config_dir: Path | None = None) -> int:
    """Print the rows of the task's table, or those of `ablation=ROW,ROW`.

    Raises:
        UserError: bad arguments, or a README without a block to fill.
    """
    options = _options(arguments)
    if options.readme:
        if not options.readme.is_file():
            raise UserError(f"--readme {options.readme}: no such file")
        save_text(options.readme, fill_verify_blocks(options.readme.read_text(encoding="utf-8")))
        return 0
    rows = _row_facts(options, config_dir)
    if options.markdown:
        print(markdown(rows, options.size), end="")
    else:
        _print_facts(rows, options.size)
    return 0


def fill_verify_blocks(text: str) -> str:
    """Fill each block `<!-- verify: ARGUMENTS -->` to `<!-- /verify -->` of a README with the Markdown table of its rows.

    Raises:
        UserError: a block is not closed, or there is none.
    """
    blocks = len(BLOCK.findall(text))
    if not blocks or blocks != text.count("<!-- verify:"):
        raise UserError("a '<!-- verify: ARGUMENTS -->' must end its line and have a '<!-- /verify -->' after it")

    def filled(block: re.Match) -> str:
        options = _options(block["arguments"].split())
        return block["open"] + markdown(_row_facts(options), options.size) + block["close"]

    return BLOCK.sub(filled, text)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = command_parser("verify", main.__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for a run; ablation=ROW,ROW chooses rows")
    parser.add_argument("--size", type=_size, default=PAPER_SIZE, metavar="HxW", help="of the image (default: 800x1000)")
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


def _row_facts(options: argparse.Namespace, config_dir: Path | None = None) -> dict[str, RowFacts]:
    rows = compose_rows(options.overrides, config_dir)
    return {cfg.row: row_facts(cfg, size=options.size) for cfg in rows}


def _print_facts(rows: dict[str, RowFacts], size: tuple[int, int]) -> None:
    two_stage = any(facts.head for facts in rows.values())
    columns = ["row", *(["proposals"] if two_stage else []), "feature", *(["head"] if two_stage else [])]
    columns += ["lateral?", "top-down?", "finest level sees"]
    parts = ["backbone", "neck", "rpn", *(["head"] if two_stage else [])]
    title = f"Rows, one image of {size[0]} x {size[1]} pixels"
    table = Table(title=title + (f", {ROIS:,} RoIs, {CLASSES} classes" if two_stage else ""))
    for column in columns:
        table.add_column(column)
    for column in [
        "# anchors",
        "parameters",
        "trained",
        *(f"GFLOPs\n{part.replace('rpn', 'RPN')}" for part in [*parts, "total"]),
    ]:
        table.add_column(column, justify="right")
    for row, facts in rows.items():
        marks = ["✓" if on else "" for on in (facts.lateral, facts.top_down)]
        proposals, head = ([facts.proposals], [facts.head]) if two_stage else ([], [])
        gflops = [*(getattr(facts, f"gflops_{part}") for part in parts), facts.gflops]
        counts = [
            *(f"{n:,}" if n else "" for n in (facts.anchors, facts.params, facts.trained)),
            *(f"{x:,.1f}" for x in gflops),
        ]
        table.add_row(row, *proposals, facts.feature, *head, *marks, " ".join(facts.reach), *counts)
    Console(width=max(180, Console().width)).print(table)


def markdown(rows: Mapping[str, RowFacts], size: tuple[int, int] = PAPER_SIZE) -> str:
    """Return a Markdown table of what each row costs, for a README; parts that no row has are left out."""
    titles = {"backbone": "backbone", "neck": "neck", "rpn": "RPN", "head": "head"}
    parts = [part for part in titles if any(getattr(facts, f"gflops_{part}") for facts in rows.values())]
    header = ["row", "parameters (M)", *(titles[part] for part in parts), "total", "neck / backbone"]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for row, facts in rows.items():
        gmac = [getattr(facts, f"gflops_{part}") / 2 for part in parts]
        figures = [facts.params / 1e6, *gmac, facts.gflops / 2]
        share = f"{facts.gflops_neck / facts.gflops_backbone:.0%}" if facts.gflops_neck else ""
        lines.append([row, *(f"{x:.1f}" if x else "" for x in figures), share])
    head = f", the head on {ROIS:,} RoIs and {CLASSES} classes, without RoI pooling" if "head" in parts else ""
    unit = f"Cost in GMAC (1e9 multiply-adds: GFLOPs / 2) for one image of {size[0]} x {size[1]}{head}."
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n{unit}\n"

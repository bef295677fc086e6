"""Print what rows are: as a table on the terminal, or as Markdown for a README."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from fpn_ablate.model.summary import CLASSES, DETECTIONS, PAPER_SIZE, ROIS, RowFacts

# Columns that are left out of a narrow terminal, first the first.
DISPENSABLE = ("GFLOPs\nmask", "GFLOPs\nhead", "GFLOPs\nRPN", "GFLOPs\nneck", "GFLOPs\nbackbone", "trained", "mask head")
DISPENSABLE += ("image scales", "head", "proposals", "feature", "top-down?", "lateral?", "finest\nlevel sees", "parameters")


def show(rows: Mapping[str, RowFacts], size: tuple[int, int], console: Console | None = None) -> None:
    """Print the rows as a table: on a terminal in the columns that fit, elsewhere in all."""
    console = console or Console()
    with_head, two_stage, masks, pyramids = (
        any(getattr(facts, key) for facts in rows.values()) for key in ("head", "proposals", "mask", "image_pyramid")
    )
    with_rpn = two_stage or not all(facts.head for facts in rows.values())
    parts = ["backbone", "neck", *(["rpn"] if with_rpn else [])]
    parts += [*(["head"] if with_head else []), *(["mask"] if masks else [])]
    columns: dict[str, list[str]] = {"row": list(rows)}

    def add(title: str, cell: Callable[[RowFacts], str], shown: bool = True) -> None:
        if shown:
            columns[title] = [cell(facts) for facts in rows.values()]

    add("proposals", lambda facts: facts.proposals or "", two_stage)
    add("feature", lambda facts: facts.feature)
    add("head", lambda facts: facts.head or "", with_head)
    add("mask head", lambda facts: facts.mask or "", masks)
    add("image scales", lambda facts: facts.image_pyramid or "", pyramids)
    add("lateral?", lambda facts: "✓" if facts.lateral else "")
    add("top-down?", lambda facts: "✓" if facts.top_down else "")
    add("finest\nlevel sees", lambda facts: " ".join(facts.reach))
    text = len(columns)
    add("# anchors" if with_rpn else "# regions", lambda facts: f"{facts.anchors:,}" if facts.anchors else "")
    add("parameters", lambda facts: f"{facts.params:,}" if facts.params else "")
    add("trained", lambda facts: f"{facts.trained:,}" if facts.trained else "")
    for part in parts:
        add(f"GFLOPs\n{part.replace('rpn', 'RPN')}", lambda facts, part=part: f"{getattr(facts, f'gflops_{part}'):,.1f}")
    add("GFLOPs\ntotal", lambda facts: f"{facts.gflops:,.1f}")
    aligned = dict.fromkeys(list(columns)[text:], "right")

    title = f"Rows, one image of {size[0]} x {size[1]} pixels"
    title += f", {ROIS:,} RoIs, {CLASSES} classes" if two_stage else ""
    title += f", masks of {DETECTIONS} detections" if masks else ""
    order = [name for name in DISPENSABLE if name in columns]
    left_out = []
    terminal = console.is_terminal
    table = _table(title, columns, aligned, terminal)
    while terminal and order and _width(console, table) > console.width:
        left_out.append(order.pop(0))
        table = _table(title, {name: cells for name, cells in columns.items() if name not in left_out}, aligned, terminal)
    if not terminal:  # a file, or `less -S`, gets every column
        console.width = max(console.width, _width(console, table))
    console.print(table)
    if left_out:
        names = ", ".join(" ".join(name.split()) for name in columns if name in left_out)
        console.print(f"left out, as the terminal is narrow: {names}", style="dim", highlight=False)
        console.print("all columns: the same command with | less -S behind it", style="dim", highlight=False)


def _table(title: str, columns: Mapping[str, Sequence[str]], aligned: Mapping[str, Any], terminal: bool) -> Table:
    layout = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "show_edge": False} if terminal else {}
    table = Table(title=title, title_justify="left", title_style="bold", **layout)
    for name in columns:
        table.add_column(name, justify=aligned.get(name, "left"), no_wrap=name == "row")
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    return table


def _width(console: Console, table: Table) -> int:
    """Return the width of the table with no cell wrapped."""
    return Measurement.get(console, console.options.update(width=1000), table).maximum


def markdown(rows: Mapping[str, RowFacts], size: tuple[int, int] = PAPER_SIZE) -> str:
    """Return a Markdown table of what each row costs, for a README; parts that no row has are left out."""
    titles = {"backbone": "backbone", "neck": "neck", "rpn": "RPN", "head": "head", "mask": "masks"}
    parts = [part for part in titles if any(getattr(facts, f"gflops_{part}") for facts in rows.values())]
    header = ["row", "parameters (M)", *(titles[part] for part in parts), "total", "neck / backbone"]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for row, facts in rows.items():
        gmac = [getattr(facts, f"gflops_{part}") / 2 for part in parts]
        figures = [facts.params / 1e6, *gmac, facts.gflops / 2]
        share = f"{facts.gflops_neck / facts.gflops_backbone:.0%}" if facts.gflops_neck else ""
        lines.append([row, *(f"{x:.1f}" if x else "" for x in figures), share])
    two_stage = any(facts.proposals for facts in rows.values())
    head = f", the head on {ROIS:,} RoIs and {CLASSES} classes, without RoI pooling" if two_stage else ""
    head += f", masks of {DETECTIONS} detections" if "mask" in parts else ""
    unit = f"Cost in GMAC (1e9 multiply-adds: GFLOPs / 2) for one image of {size[0]} x {size[1]}{head}."
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n{unit}\n"

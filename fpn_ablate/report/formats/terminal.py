"""Print a table on the terminal: the rows that were run, in the columns that fit; the whole is in a file."""

from collections.abc import Collection, Sequence
from itertools import groupby
from operator import itemgetter

from rich import box
from rich.console import Console, Group
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from fpn_ablate.report.collate.claims import NO_RESULT
from fpn_ablate.report.collate.definition import BASELINE
from fpn_ablate.report.collate.table import Table
from fpn_ablate.report.formats.grid import Grid, Line, grid

# Footer lines that a single run's row needs to be understood.
ESSENTIAL = ("data", "images", "backbone", "±", "device")
# Footer lines that a terminal leaves to the file, or the table would be out of sight.
DETAILS = (
    *("objects", "evaluator", "same runs", "pairing", "noise", "p"),
    *("code", "proposals", "cost", "effects", "note", "published"),
)


def show(
    table: Table, console: Console | None = None, rows: Collection[str] = (), whole: object = None, fit: bool | None = None
) -> None:
    """Print the table without rows that have no run and claims that cannot be judged yet; a line counts them.

    Args:
        rows: print these rows alone, the baseline and the differences between them, as after a single run.
        whole: the file that holds the whole table, for a hint.
        fit: leave columns out until the rest fits the width, and details of the footer; by default on a terminal. Elsewhere
            no figure is ever cut or left out, so that a file, or `less -S`, gets every column.
    """
    console = console or Console()
    fit = console.is_terminal if fit is None else fit
    content = grid(table)
    lines, verdicts = _shown_lines(table, content, rows), [] if rows else _judged(table, content)
    columns = list(range(1, len(content.header)))
    rich_table = _rich_table(table, content, lines, columns)
    order = _dispensable(table)
    while fit and order and _width(console, rich_table) > console.width:
        columns.remove(order.pop(0))
        rich_table = _rich_table(table, content, lines, columns)
    left_out = [content.header[column] for column in range(1, len(content.header)) if column not in columns]

    parts = [Text(content.title, style="bold")]
    parts += [Text(content.banner, style="bold yellow")] if content.banner else []
    parts += [Text(content.legend)] if any(line.kind in ("paper", "published") for line in lines) else []
    console.print(Group(*parts, Text()))
    width = console.width
    console.width = width if fit else max(width, _width(console, rich_table))
    console.print(Group(rich_table, Text()))
    console.width = width  # sentences wrap where the terminal does
    console.print(Group(*_verdict_lines(verdicts)))
    notes = [Text(f"[{n}] {note}") for n, note in enumerate(content.notes, start=1) if not rows or _is_marked(lines, n)]
    left_to_file = DETAILS if fit and whole else ()
    footer = [(label, text) for label, text in content.footer if label not in left_to_file and (not rows or label in ESSENTIAL)]
    footer = [Text(f"{label}: {text}", style="dim") for label, text in footer]
    console.print(Group(*notes, *footer, *_hints(table, rows, left_out, whole)))


def _shown_lines(table: Table, content: Grid, rows: Collection[str]) -> list[Line]:
    """Leave out rows without a run, and what stands below them; with `rows` all but these and the baseline."""
    lines, shown = [], True
    effects = iter(table.effects)
    names = {*rows, _baseline(table)} if rows else set()
    for line in content.lines:
        if line.kind == "effect":
            effect = next(effects)
            wanted = not rows or effect.row in rows or any(effect.title.startswith(f"{row} − ") for row in rows)
            if wanted and line.state != NO_RESULT:
                lines.append(line)
        elif line.kind == "published":
            lines += [] if rows else [line]
        else:
            if line.kind == "ours":
                shown = bool(line.row.states) and (not rows or line.row.row in names)
                shown = shown and (line.row.row in rows or not rows or bool(line.row.seeds))
            lines += [line] if shown and not (rows and line.kind == "control") else []
    return lines


def _baseline(table: Table) -> str:
    wanted = table.definition.baseline or BASELINE
    spec = next((spec for spec in table.definition.rows if wanted in spec.names), None)
    names = spec.names if spec else (wanted,)
    return next((row.row for row in table.rows if row.row in names), wanted)


def _judged(table: Table, content: Grid) -> list[dict[str, str]]:
    return [cells for verdict, cells in zip(table.verdicts, content.verdicts, strict=True) if verdict.look]


def _is_marked(lines: Sequence[Line], note: int) -> bool:
    return any(f"[{note}]" in line.label for line in lines)


def _hints(table: Table, rows: Collection[str], left_out: Sequence[str], whole: object) -> list[Text]:
    """Say what is not shown, and where it is."""
    hints = []
    if left_out:
        hints.append(f"left out, as the terminal is narrow: {', '.join(left_out)}")
    if not rows:
        missing = [row.row for row in table.rows if not row.states and not row.published_only]
        hints += [f"not run: {', '.join(missing)}"] if missing else []
        unjudged = [verdict.verdict == NO_RESULT for verdict in table.verdicts if not verdict.look]
        why = "rows are not run or not healthy at a common seed"
        hints += [f"no result, as {why}: {sum(unjudged)} claims"] if any(unjudged) else []
        needed = table.seeds_to_judge
        hints += [f"not judged before {needed} seeds: {unjudged.count(False)} claims"] if not all(unjudged) else []
    if whole:
        hints.append(f"the whole table: {whole}")
    return [Text(hint, style="dim") for hint in hints] + [Text()]


def _dispensable(table: Table) -> list[int]:
    """Return columns in the order in which they are left out: costs, facts from the last on, n, metrics but the first.

    Of the facts those stay longest that say which row it is: its feature, and the marks of lateral and top-down.
    """
    facts, metrics = len(table.definition.facts), table.definition.metrics
    ranks = [(fact.key == "feature", fact.style == "check", -n) for n, fact in enumerate(table.definition.facts)]
    ordered = [1 - rank[-1] for rank in sorted(ranks)]
    first = facts + 2  # behind the label, the facts and n
    costs = [first + n for n, metric in enumerate(metrics) if metric.source]
    figures = [first + n for n, metric in enumerate(metrics) if not metric.source]
    return [*reversed(costs), *ordered, facts + 1, *reversed(figures[1:])]


def _width(console: Console, rich_table: RichTable) -> int:
    return Measurement.get(console, console.options.update(width=1000), rich_table).minimum


def _rich_table(table: Table, content: Grid, lines: Sequence[Line], columns: Sequence[int]) -> RichTable:
    rows: list[tuple[str, Sequence[str]]] = []
    for line in lines:
        label = content.paper_label if line.kind == "paper" else line.label
        # A state's details are in a note; in each cell they would make the table twice as wide.
        values = ((line.state or value).partition(" @ ")[0].replace(" ± ", "±") for value in line.metrics)
        rows.append(("" if line.ours else "dim", (label, *line.facts, *values)))
        if any(line.differences):
            label = "p (Holm)" if line.kind == "effect" else table.difference_label
            rows.append(("dim", (label, *("" for _ in line.facts), *(text.removeprefix("p ") for text in line.differences))))
    rich_table = RichTable(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    rich_table.add_column("", min_width=13)
    for number in columns:
        # A title breaks at its hyphen too, or "top-down?" would be as wide as a result.
        heading = Text(content.header[number].replace("-", "-\n").replace(" ", "\n"))
        # Fixed, since rich shrinks any column that may wrap, even below its min_width.
        width = max(len(text) for text in (*heading.plain.split("\n"), *(cells[number] for _, cells in rows)))
        rich_table.add_column(heading, justify="right" if content.align_right[number] else "left", width=width)
    for number, (style, cells) in enumerate(rows):
        last = number + 1 == len(rows) or not rows[number + 1][0]
        rich_table.add_row(*(Text(cells[column], style=style) for column in (0, *columns)), end_section=last)
    return rich_table


def _verdict_lines(verdicts: Sequence[dict[str, str]]) -> list[Text]:
    """Write each claim in a line, and below it a line for each metric: verdict, our difference and the published one."""
    lines = []
    for claim, group in groupby(verdicts, key=itemgetter("claim")):
        lines.append(Text(claim))
        for verdict in group:
            outcome = verdict["verdict"]
            parts = [verdict["ours"].replace(" ± ", "±")]
            parts += [f"published {verdict['published']}"] if verdict["published"] else []
            parts += [f"n {verdict['n']}", *([f"p {verdict['p (Holm)']}"] if verdict["p (Holm)"] else [])]
            style = {"supported": "green", "contradicted": "red"}.get(outcome.partition(";")[0], "")
            lines.append(Text.assemble(f"  {verdict['metric']} ", (outcome, style), f": {', '.join(parts)}"))
    return [*lines, Text()] if lines else []

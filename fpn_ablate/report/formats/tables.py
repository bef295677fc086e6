"""Print a table for the terminal, as Markdown, LaTeX and CSV. All but the CSV come from the grid of `grid`.

Each row of the table has a line of ours and, if the paper has that row, the paper's figures and the difference below it: in
brackets in Markdown and LaTeX, on a separate line in the terminal, where width is scarce.
"""

import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from fpn_ablate.report.collate.definition import Metric
from fpn_ablate.report.collate.records import to_csv
from fpn_ablate.report.collate.stats import Estimate
from fpn_ablate.report.collate.table import Row, Table, Verdict
from fpn_ablate.report.formats.grid import CHECK, VERDICT_HEADER, WITHIN_NOISE, Grid, Line, grid

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable


def show(table: Table, console: "Console | None" = None) -> None:
    """Print the table, never narrower than its figures need: a cut figure is worse than a wrapped line."""
    from rich.console import Console, Group
    from rich.measure import Measurement
    from rich.text import Text

    console = console or Console()
    content = grid(table)
    rich_table = _rich_table(content)
    parts = [Text(content.title, style="bold")]
    parts += [Text(content.banner, style="bold yellow")] if content.banner else []
    parts += [Text(content.legend)] if content.legend else []
    notes = [Text(f"[{number}] {note}") for number, note in enumerate(content.notes, start=1)]
    footer = [Text(f"{label}: {text}", style="dim") for label, text in content.footer]
    console.width = max(console.width, Measurement.get(console, console.options.update(width=1000), rich_table).minimum)
    verdicts = [_rich_verdicts(content), Text()] if content.verdicts else []
    console.print(Group(*parts, Text(), rich_table, Text(), *verdicts, *notes, *footer, Text()))


def _rich_table(content: Grid) -> "RichTable":
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    rows: list[tuple[str, tuple[str, ...]]] = []
    for line in content.lines:
        label = content.paper_label if line.kind == "paper" else line.label
        values = tuple(value.replace(" ± ", "±") for value in line.metrics)
        rows.append(("" if line.ours else "dim", (label, *line.facts, *values)))
        if any(line.differences):
            rows.append(("dim", (content.difference_label, *("" for _ in line.facts), *line.differences)))
    rich_table = RichTable(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    rich_table.add_column("", min_width=16)
    for number, title in enumerate(content.header[1:], start=1):
        # A title breaks at its hyphen too, or "top-down?" would be as wide as a result.
        heading = Text(title.replace("-", "-\n").replace(" ", "\n"))
        # Fixed, since rich shrinks any column that may wrap, even below its min_width.
        width = max(len(text) for text in (*heading.plain.split("\n"), *(cells[number] for _, cells in rows)))
        rich_table.add_column(heading, justify="right" if content.align_right[number] else "left", width=width)
    for number, (style, cells) in enumerate(rows):
        last = number + 1 == len(rows) or not rows[number + 1][0]
        rich_table.add_row(*(Text(cell, style=style) for cell in cells), end_section=last)
    return rich_table


def _rich_verdicts(content: Grid) -> "RichTable":
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    rich_table = RichTable(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for number, title in enumerate(VERDICT_HEADER):
        rich_table.add_column(
            title, justify="right" if title in ("ours", "n", "published", "p (Holm)") else "left", min_width=12 * (not number)
        )
    for cells in content.verdicts:
        style = {"supported": "green", "contradicted": "red"}.get(cells[VERDICT_HEADER.index("verdict")].split(";")[0], "")
        rich_table.add_row(
            *(Text(cell.replace(" ± ", "±"), style=style if cell.startswith(("supp", "contra")) else "") for cell in cells)
        )
    return rich_table


def markdown(table: Table) -> str:
    """Return the table in GitHub's Markdown, without a heading so that it fits anywhere."""
    content = grid(table)
    text = [f"**{escape_markdown(content.title)}**", ""]
    text += [f"> **{content.banner}**", ""] if content.banner else []
    text += [escape_markdown(content.legend), ""] if content.legend else []
    text.append(_pipe(escape_markdown(cell) for cell in content.header))
    text.append(_pipe("---:" if align_right else "---" for align_right in content.align_right))
    for line in content.lines:
        cells = [escape_markdown(cell) for cell in line.cells]
        cells = [f"**{cell}**" if best else cell for cell, best in zip(cells, _best(line), strict=True)]
        text.append(_pipe([f"**{cells[0]}**" if line.ours else f"*{cells[0]}*", *cells[1:]]))
    text.append("")
    if content.verdicts:
        text += [_pipe(VERDICT_HEADER), _pipe("---" for _ in VERDICT_HEADER)]
        text += [_pipe(map(escape_markdown, cells)) for cells in content.verdicts]
        text.append("")
    text += [f"- \\[{number}\\] {escape_markdown(note)}" for number, note in enumerate(content.notes, start=1)]
    text += [f"- {label}: {escape_markdown(value)}" for label, value in content.footer]
    return "\n".join(text) + "\n"


def latex(table: Table) -> str:
    """Return a `table` environment; needs the packages booktabs, amssymb and graphicx."""
    content = grid(table)
    caption = ". ".join(part.rstrip(".") for part in (content.title, content.banner, content.legend) if part)
    body = [r"\begin{table}", r"\centering\footnotesize", r"\setlength{\tabcolsep}{3pt}"]
    body += [rf"\caption{{{_breakable(caption)}.}}"]
    # Shrink the table to the page if it is wider.
    body += [r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"]
    body += [
        rf"\begin{{tabular}}{{{''.join('r' if align_right else 'l' for align_right in content.align_right)}}}",
        r"\toprule",
    ]
    body += [" & ".join(map(escape_latex, content.header)) + r" \\", r"\midrule"]
    first = 1 + len(content.lines[0].facts) if content.lines else 1
    for number, line in enumerate(content.lines):
        if line.kind != "paper" and number:
            first_effect = line.kind == "effect" and content.lines[number - 1].kind != "effect"
            body.append(r"\midrule" if first_effect else r"\addlinespace")
        cells = [escape_latex(cell) for cell in line.cells]
        cells = [rf"\textbf{{{cell}}}" if best else cell for cell, best in zip(cells, _best(line), strict=True)]
        label = rf"\quad {cells[0]}" if line.kind == "paper" else cells[0]
        body.append(" & ".join([label, *cells[1:first], *map(_minus, cells[first:])]) + r" \\")
    body += [r"\bottomrule", r"\end{tabular}}", r"\par\smallskip", *_latex_verdicts(content)]
    body += [r"\begin{minipage}{\linewidth}\scriptsize"]
    body += [rf"{{[{number}]}} {_breakable(note)}\par" for number, note in enumerate(content.notes, start=1)]
    body += [rf"{escape_latex(label)}: {_breakable(text)}\par" for label, text in content.footer]
    body += [r"\end{minipage}", r"\end{table}"]
    return "% Needs \\usepackage{booktabs,amssymb,graphicx}\n" + "\n".join(body) + "\n"


def _latex_verdicts(content: Grid) -> list[str]:
    if not content.verdicts:
        return []
    lines = [r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"]
    lines += [r"\begin{tabular}{llrrrlr}", r"\toprule", " & ".join(map(escape_latex, VERDICT_HEADER)) + r" \\", r"\midrule"]
    for cells in content.verdicts:
        first, *rest = map(escape_latex, cells)
        lines.append(" & ".join([first, *map(_minus, rest)]) + r" \\")
    return [*lines, r"\bottomrule", r"\end{tabular}}", r"\par\smallskip"]


def _breakable(text: str) -> str:
    """Escape text for LaTeX, with break points in the long names of recipes."""
    return re.sub(r"(?<=\w)(\+|\\_|=)(?=\w)", r"\1\\allowbreak{}", escape_latex(text))


def _minus(cell: str) -> str:
    """Replace hyphens before figures by minus signs."""
    return re.sub(r"(?<![\w-])-(?=\d)", "$-$", cell)


def _best(line: Line) -> list[bool]:
    """Return for each cell of a line whether it is set in bold; label and facts never are."""
    return [False] * (1 + len(line.facts)) + list(line.best or [False] * len(line.metrics))


def csv_text(table: Table) -> str:
    """Return CSV with one line for each row and metric, then for each effect and metric, at full precision.

    A line of an effect has no `row`, and the effect's title as `label`. Cells are encoded as in the ledger
    (`records.encode`).
    """
    definition = table.definition
    rows = [*table.rows, *([table.control] if table.control else [])]
    seeds = sorted({seed for row in rows for seed in row.states})
    columns = ["table", "recipe", "data", "generated", "warning", "setting", "row", "letter", "label"]
    columns += [fact.key for fact in definition.facts]
    columns += ["metric", "unit", "state", "n", "mean", "low", "high", "std", "published", "difference", "difference_between"]
    columns += ["noise", *(f"seed_{seed}" for seed in seeds)]
    entries = [([row.row, row.letter, row.label, *row.facts.values()], _state(row), row.cells) for row in table.rows]
    blank = [None for _ in definition.facts]
    if control := table.control:
        names = [control.row, None, control.label, *control.facts.values()]
        entries.append((names, f"A/A control, {_state(control)}", control.cells))
    entries += [([None, None, e.title, *blank], "effect" if e.seeds else "not run", e.cells) for e in table.effects]
    between = "same data" if table.same_data else "different data sets"
    lines = []
    for names, state, cells in entries:
        for metric in definition.metrics:
            cell = cells[metric.key]
            line = [*table.key, table.generated, table.warning or None, table.setting, *names, metric.key, _unit(metric), state]
            line += [cell.ours.n, cell.ours.mean, cell.ours.low, cell.ours.high, cell.ours.std, cell.published, cell.difference]
            line += [None if cell.difference is None else between, getattr(cell, "noise", None)]
            lines.append(line + [cell.values.get(seed) for seed in seeds])
    return to_csv(columns, lines)


def claims_csv(table: Table) -> str:
    """Return CSV with one line for each claim about the table, at full precision; differences in points."""
    lines = [_claim_line(table, verdict) for verdict in table.verdicts]
    return to_csv(lines[0], (line.values() for line in lines))


def _claim_line(table: Table, verdict: Verdict) -> dict[str, Any]:
    claim, contrast = verdict.claim, verdict.contrast
    ours = contrast.ours if contrast else Estimate(0)
    line = dict(zip(("table", "recipe", "data"), table.key, strict=True))
    line |= {"generated": table.generated, "warning": table.warning or None}
    line |= {"claim": claim.text, "ours_only": claim.ours, "metric": claim.metric, "less": claim.less}
    line |= {"plus": " ".join(claim.plus), "minus": " ".join(claim.minus)}
    line |= {key: bound if math.isfinite(bound) else None for key, bound in (("above", claim.above), ("below", claim.below))}
    line |= {"n": ours.n, "mean": ours.mean, "low": ours.low, "high": ours.high}
    line |= {"published": verdict.published, "verdict": verdict.verdict}
    line |= {"p_holm": verdict.p, "seeds_needed": verdict.seeds_needed, "noise": contrast.noise if contrast else None}
    return line | {"variance_removed_by_pairing": contrast.variance_removed if contrast else None}


def escape_markdown(text: str) -> str:
    """Escape text so that GitHub's Markdown shows it as it is, in tables too."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", text)


# Characters that LaTeX reads as commands, and those that plain pdflatex cannot set.
LATEX = {char: f"\\{char}" for char in "&%$#_{}"}
LATEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
LATEX |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
LATEX |= {
    "±": r"$\pm$",
    CHECK: r"$\checkmark$",
    "Δ": r"$\Delta$",
    "·": r"$\cdot$",
    "–": "--",
    "−": "$-$",
    "…": r"\dots{}",
    WITHIN_NOISE: r"$\dagger$",
    "�": "?",
}
LATEX |= {"[": "{[}", "]": "{]}"}  # "\\ [" would be read as a length


def escape_latex(text: str) -> str:
    """Escape text for LaTeX; a character that plain pdflatex cannot set becomes its code point."""
    return "".join(LATEX.get(char) or (char if ord(char) < 0x180 else f"U+{ord(char):04X}") for char in text)


def _pipe(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _state(row: Row) -> str:
    """Return the row's state for the CSV, or the state of each seed if they differ."""
    if len(set(row.states.values())) <= 1:
        return row.state
    return ", ".join(f"seed {seed} {state}" for seed, state in row.states.items())


def _unit(metric: Metric) -> str:
    return "percent" if metric.scale == 100 else f"record times {metric.scale:g}"

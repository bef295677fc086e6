"""Write a table as Markdown, LaTeX and CSV. All but the CSV come from the grid of `grid`, as does what `terminal` prints.

Each row of the table has a line of ours and, if the paper has that row, the paper's figures below it, with the difference in
brackets.
"""

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

from fpn_ablate.report.collate.claims import NO_RESULT
from fpn_ablate.report.collate.records import to_csv
from fpn_ablate.report.collate.stats import Estimate
from fpn_ablate.report.collate.table import Row, Table, Verdict
from fpn_ablate.report.formats.grid import CHECK, VERDICT_HEADER, WITHIN_NOISE, Line, grid


def markdown(table: Table) -> str:
    """Return the table in GitHub's Markdown, without a heading so that it fits anywhere."""
    content = grid(table)
    text = [f"**{escape_markdown(content.title)}**", ""]
    text += [f"> **{content.banner}**", ""] if content.banner else []
    text += [escape_markdown(content.legend), ""] if content.legend else []
    text.append(_pipe(escape_markdown(cell) for cell in content.header))
    text.append(_pipe("---:" if align_right else "---" for align_right in content.align_right))
    for line in content.lines:
        first, *cells = (f"**{cell}**" if best else cell for cell, best in _cells(line, escape_markdown))
        text.append(_pipe([f"**{first}**" if line.ours else f"*{first}*", *cells]))
    text.append("")
    if content.verdicts:
        text += [_pipe(VERDICT_HEADER), _pipe("---" for _ in VERDICT_HEADER)]
        text += [_pipe(map(escape_markdown, verdict.values())) for verdict in content.verdicts]
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
    lines, previous = [], None
    for line in content.lines:
        if line.kind != "paper" and previous:
            lines.append(r"\midrule" if line.kind == "effect" and previous != "effect" else r"\addlinespace")
        previous = line.kind
        cells = [rf"\textbf{{{cell}}}" if best else cell for cell, best in _cells(line, escape_latex)]
        cells[0] = rf"\quad {cells[0]}" if line.kind == "paper" else cells[0]
        first = 1 + len(line.facts)
        lines.append(" & ".join([*cells[:first], *map(_minus, cells[first:])]) + r" \\")
    body += _tabular("".join("r" if align_right else "l" for align_right in content.align_right), content.header, lines)
    if content.verdicts:
        rows = ([escape_latex(cell) for cell in verdict.values()] for verdict in content.verdicts)
        body += _tabular("llrrrlr", VERDICT_HEADER, [" & ".join([row[0], *map(_minus, row[1:])]) + r" \\" for row in rows])
    body += [r"\begin{minipage}{\linewidth}\scriptsize"]
    body += [rf"{{[{number}]}} {_breakable(note)}\par" for number, note in enumerate(content.notes, start=1)]
    body += [rf"{escape_latex(label)}: {_breakable(text)}\par" for label, text in content.footer]
    body += [r"\end{minipage}", r"\end{table}"]
    return "% Needs \\usepackage{booktabs,amssymb,graphicx}\n" + "\n".join(body) + "\n"


def _tabular(columns: str, header: Iterable[str], lines: Iterable[str]) -> list[str]:
    """Return a tabular that is shrunk to the page if it is wider."""
    return [
        *(r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%", rf"\begin{{tabular}}{{{columns}}}", r"\toprule"),
        *(" & ".join(map(escape_latex, header)) + r" \\", r"\midrule", *lines, r"\bottomrule"),
        *(r"\end{tabular}}", r"\par\smallskip"),
    ]


def _breakable(text: str) -> str:
    """Escape text for LaTeX, with break points in the long names of recipes."""
    return re.sub(r"(?<=\w)(\+|\\_|=)(?=\w)", r"\1\\allowbreak{}", escape_latex(text))


def _minus(cell: str) -> str:
    """Replace hyphens before figures by minus signs."""
    return re.sub(r"(?<![\w-])-(?=\d)", "$-$", cell)


def _cells(line: Line, escape: Callable[[str], str]) -> list[tuple[str, bool]]:
    """Return each cell of a line, escaped, and whether it is set in bold; label and facts never are."""
    best = [False] * (1 + len(line.facts)) + list(line.best or [False] * len(line.metrics))
    return list(zip(map(escape, line.cells), best, strict=True))


def csv_text(table: Table) -> str:
    """Return CSV with one line for each row and metric, then for each effect and metric, at full precision.

    A line of an effect has no `row`, and the effect's title as `label`. Cells are encoded as in the ledger
    (`records.encode`).
    """
    definition = table.definition
    seeds = sorted({seed for row in table.all_rows for seed in row.states})
    columns = ["table", "recipe", "data", "generated", "warning", "setting", "row", "letter", "label"]
    columns += [fact.key for fact in definition.facts]
    columns += ["metric", "unit", "state", "n", "mean", "low", "high", "std", "published", "difference", "difference_between"]
    columns += ["noise", "p_holm", *(f"seed_{seed}" for seed in seeds)]
    entries = []
    for row in table.all_rows:
        state = f"A/A control, {_state(row)}" if row is table.control else _state(row)
        entries.append(([row.row, row.letter, row.label, *row.facts.values()], state, row.cells, {}))
    blank = [None for _ in definition.facts]
    entries += [([None, None, e.title, *blank], "effect" if e.seeds else NO_RESULT, e.cells, e.p) for e in table.effects]
    between = "same data" if table.same_data else "different data sets"
    lines = []
    for names, state, cells, p in entries:
        for metric in definition.metrics:
            cell = cells[metric.key]
            unit = "percent" if metric.scale == 100 else f"record times {metric.scale:g}"
            line = [*table.key, table.generated, table.warning or None, table.setting, *names, metric.key, unit, state]
            line += [cell.ours.n, cell.ours.mean, cell.ours.low, cell.ours.high, cell.ours.std, cell.published, cell.difference]
            line += [None if cell.difference is None else between, getattr(cell, "noise", None), p.get(metric.key)]
            lines.append(line + [cell.values.get(seed) for seed in seeds])
    return to_csv(columns, lines)


def claims_csv(table: Table) -> str:
    """Return CSV with one line for each claim about the table, at full precision; differences in points, or ratios."""
    lines = [_claim_line(table, verdict) for verdict in table.verdicts]
    return to_csv(lines[0], (line.values() for line in lines))


def _claim_line(table: Table, verdict: Verdict) -> dict[str, Any]:
    claim, contrast = verdict.claim, verdict.contrast
    ours = contrast.ours if contrast else Estimate(0)
    shown = contrast.shown if contrast else lambda value: value
    return {
        **dict(zip(("table", "recipe", "data"), table.key, strict=True)),
        **{"generated": table.generated, "warning": table.warning or None},
        **{"claim": claim.text, "ours_only": claim.ours, "metric": claim.metric, "less": claim.less, "ratio": claim.ratio},
        **{"plus": " ".join(claim.plus), "minus": " ".join(claim.minus)},
        "above": claim.above if math.isfinite(claim.above) else None,
        "below": claim.below if math.isfinite(claim.below) else None,
        **{"n": ours.n, "mean": shown(ours.mean), "low": shown(ours.low), "high": shown(ours.high)},
        **{"published": shown(verdict.published), "verdict": verdict.verdict},
        "look": verdict.look.number if verdict.look else None,
        **{"p_holm": verdict.p, "seeds_needed": verdict.seeds_needed, "noise": contrast.noise if contrast else None},
        "variance_removed_by_pairing": contrast.variance_removed if contrast else None,
    }


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

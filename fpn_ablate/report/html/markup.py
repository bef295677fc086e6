"""Prepare a table's grid for the page's template: groups of lines that are sorted together, cells split into parts."""

import re
from dataclasses import dataclass
from typing import Any

from fpn_ablate.report.collate.claims import ICONS
from fpn_ablate.report.collate.table import Row, Table
from fpn_ablate.report.formats.grid import Grid, Line

NUMBER = re.compile(r"[+−-]?\d+(\.\d+)?")


@dataclass(frozen=True)
class Part:
    """A cell: its main text, the smaller text beside it, and its CSS classes (`kind`)."""

    main: str
    minor: str = ""
    kind: str = ""
    span: int = 1


@dataclass(frozen=True)
class Group:
    """A row with the lines below it."""

    kind: str
    lines: list[tuple[Line, list[Part]]]
    row: Row | None = None


def groups(table: Table, content: Grid) -> list[Group]:
    """Group all lines of a table. The effects come last and are not sorted."""
    rows = iter([row for row in table.rows if not row.published_only])
    grouped: list[Group] = []
    for line in content.lines:
        parts = _parts(line)
        if line.kind in ("paper", "control") or (line.kind == "effect" and grouped and grouped[-1].kind == "effect"):
            grouped[-1].lines.append((line, parts))
        else:
            row = next(rows) if line.kind == "ours" else None
            grouped.append(Group(line.kind, [(line, parts)], row))
    return grouped


def seeds(table: Table, row: Row) -> list[tuple[int, str]]:
    """List each seed that the table plans or that has a record, with its state."""
    planned = sorted({*row.states, *(table.definition.seeds if row.row in {r.row for r in table.rows} else ())})
    return [(seed, row.states.get(seed, "not run")) for seed in planned]


def verdicts(table: Table, content: Grid) -> list[dict[str, Any]]:
    """Return the cells of each verdict by their header, with its word, icon and further text."""
    rows = []
    for verdict, named in zip(table.verdicts, content.verdicts, strict=True):
        more = named["verdict"].removeprefix(verdict.verdict).removeprefix("; ")
        removed = verdict.contrast.variance_removed if verdict.contrast and verdict.contrast.ours.n > 1 else None
        cells = named | {"word": verdict.verdict, "icon": ICONS[verdict.verdict], "more": more, "ours": _value(named["ours"])}
        cells["removed"] = "" if removed is None else f"{100 * removed:.0f} %"
        rows.append(cells | {"within": bool(verdict.contrast) and verdict.contrast.within_noise})
    return rows


def _parts(line: Line) -> list[Part]:
    *facts, count = line.facts
    cells = [*(Part(fact, kind="fact long" if len(fact) > 14 else "fact") for fact in facts), Part(count, kind="n")]
    if line.metrics and len(set(line.metrics)) == 1 and line.ours and not NUMBER.match(line.metrics[0]):
        kind = "hole" if line.metrics[0] == "not run" else "state"
        return [*cells, Part(line.metrics[0], kind=f"{kind} metric", span=len(line.metrics))]
    for n, text in enumerate(line.metrics):
        best = " best" if line.best and line.best[n] else ""
        difference = line.differences[n] if line.differences else ""
        part = _value(text)
        cells.append(Part(part.main, f"{difference}" if difference else part.minor, f"metric{best}"))
    return cells


def _value(text: str) -> Part:
    """Split `45.0 ± 0.3 (n=2)` into the value and the rest."""
    main, space, rest = text.partition(" ± ")
    return Part(main, f"± {rest}") if space else Part(text)

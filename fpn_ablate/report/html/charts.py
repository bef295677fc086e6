"""Charts of the page: one function a chart, which returns the specification and its texts, or a line on why there is none."""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from fpn_ablate.report.collate.claims import ICONS
from fpn_ablate.report.collate.table import Table
from fpn_ablate.report.formats import series
from fpn_ablate.report.formats.series import Point
from fpn_ablate.report.html import vega

LINE = 44  # pixels a line of the effects


@dataclass(frozen=True)
class Chart:
    """A chart: its Vega-Lite specification and its texts. `summary` is the text alternative.

    The reader sets the specification's parameter `choice` to one of `choices`.
    """

    key: str
    title: str
    note: str
    spec: dict[str, Any]
    summary: str
    choices: tuple[str, ...] = ()
    choice_label: str = ""


def charts(table: Table, colours: Mapping[str, int], steps: int = series.MAX_STEPS) -> list[Chart | str]:
    """Build a table's charts; for one that cannot be drawn, a line on what is missing. `steps`: points of a learning curve."""
    rows = [
        {"row": r.row, "label": series.row_name(r), "colour": f"var(--c{colours[r.row]})"} for r in series.finished_rows(table)
    ]
    return [recall(table, rows), effects(table), costs(table, rows), curves(table, rows, steps)]


def recall(table: Table, rows: list[Point]) -> Chart | str:
    """Plot AR@100 against the size of the object."""
    points = series.recall_by_size(table)
    if not points:
        return "Recall against object size: no record has it. python -m fpn_ablate artifacts RUNS adds it."
    first, last = min(point["side"] for point in points), max(point["side"] for point in points)
    sides = tuple(2**k for k in range(1, 13) if first <= 2**k <= last)
    bounds = [{"side": bound} for bound in series.size_bounds(table)]
    spec = _filled(vega.recall(sides, bool(bounds)), points, rows, bounds=bounds)
    note = (
        "Line: mean over seeds; band: from the lowest seed to the highest. Dotted: the bounds between small, medium and large."
    )
    return Chart("recall", "Recall against object size", note, spec, _ends(points, rows, "side", "px", "AR@100 %"))


def curves(table: Table, rows: list[Point], steps: int = series.MAX_STEPS) -> Chart | str:
    """Plot one loss at a time against the step."""
    points = series.losses(table, steps)
    if not points:
        return "Learning curves: the folders of the runs, with their metrics.jsonl, are not on this disk."
    choices = tuple(dict.fromkeys(point["loss"] for point in points))
    first = [point for point in points if point["loss"] == choices[0]]
    note = "Line: mean over seeds; band: from the lowest seed to the highest."
    spec = _filled(vega.curves(), points, rows, choices[0])
    return Chart("curves", "Learning curves", note, spec, _ends(first, rows, "step", "steps", choices[0]), choices, "loss")


def costs(table: Table, rows: list[Point]) -> Chart | str:
    """Plot each row's main metric against its cost."""
    points = series.costs(table)
    if not points:
        return "Cost against accuracy: no record has both."
    choices, title = tuple(dict.fromkeys(point["kind"] for point in points)), series.first_metric(table).title
    first = [point for point in points if point["kind"] == choices[0]]
    names = {row["row"]: row["label"] for row in rows}
    summary = "; ".join(f"{names[p['row']]}: {p['cost']:g} {choices[0]}, {title} {p['mean']:.1f}" for p in first)
    note = f"Up is better, left is cheaper. {title} with its 95 % interval where there is one."
    spec = _filled(vega.costs(title, **_has_values(points, "low")), points, rows, choices[0])
    return Chart("costs", "Cost against accuracy", note, spec, summary, choices, "cost")


def effects(table: Table) -> Chart | str:
    """Plot the differences of rows and their intervals beside the published ones."""
    points = series.effects(table)
    if not points:
        return "Effect sizes: no claim or effect has a seed for which all its rows are finished."
    for point in points:
        metric = f"{point['metric']}, {point['contrast']}" if point["contrast"] else point["metric"]
        point["line"] = f"{ICONS.get(point['verdict'], '')}  {point['title']} · {metric}".strip()
    layers = _has_values(points, "low", "published", "noise")
    spec = _filled(vega.effects(**layers), points) | {"height": LINE * len(points)}
    note = "Dot and line: ours with its 95 % interval."
    if layers["published"]:
        other = "" if table.same_data else f" on other data ({table.definition.paper.data})"
        note += f" Hollow diamond: published{other}."
    note += " Grey: differences between equal rows; pale: an effect within them." if layers["noise"] else ""
    note += " ✓ supported, ✗ contradicted, ? inconclusive." if table.verdicts else ""
    return Chart("effects", "Effect sizes", note, spec, "; ".join(map(_effect_words, points)))


def _filled(
    template: dict[str, Any], points: list[Point], rows: Iterable[Point] = (), choice: str = "", bounds: Iterable[Point] = ()
) -> dict[str, Any]:
    """Fill a specification with the data of one table."""
    spec = deepcopy(template)
    points = [{key: value for key, value in point.items() if key != "label"} for point in points]  # is in `rows`
    spec["datasets"] = {"points": points, "rows": list(rows), "bounds": list(bounds) or [{"zero": 0}]}
    for parameter in spec["params"]:
        parameter["value"] = choice if parameter["name"] == "choice" else ""
    return spec


def _has_values(points: list[Point], *keys: str) -> dict[str, bool]:
    """Return for each key whether any point has a value: a layer without one would have no scale."""
    return {key: any(point[key] is not None for point in points) for key in keys}


def _effect_words(point: Point) -> str:
    between = "" if point["low"] is None else f" ({point['low']:+.1f} to {point['high']:+.1f})"
    return f"{point['line']}: {point['mean']:+.1f}{between}"


def _ends(points: list[Point], rows: list[Point], along: str, unit: str, metric: str) -> str:
    """Describe the first and last value of each row in words."""
    parts = []
    for row in rows:
        if line := sorted((p for p in points if p["row"] == row["row"]), key=lambda p: p[along]):
            ends = [f"{p['mean']:.3g} at {p[along]:.0f} {unit}" for p in (line[0], line[-1])]
            parts.append(f"{row['label']}: {' to '.join(ends)}")
    return f"{metric}: {'; '.join(parts)}"

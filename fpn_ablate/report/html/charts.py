"""Charts of the page and of the figures: one function a chart, which returns a Vega-Lite specification, or why there is none.

A specification holds its points, in the table's unit (percent); its parameters are `highlight`, a row as r0, r1, ..., and
`choice`. Colours are CSS variables: a change of theme, or printing, also recolours a drawn chart.
"""

import math
import resource
from collections.abc import Iterable, Mapping
from itertools import pairwise
from statistics import fmean

from fpn_ablate.report.collate.cells import Contrast
from fpn_ablate.report.collate.claims import ICONS
from fpn_ablate.report.collate.table import Record, Table, clean
from fpn_ablate.report.html.curves import MAX_STEPS, curves
from fpn_ablate.report.html.diagnosis import diagnosis
from fpn_ablate.report.html.labels import LABEL_FONT, NARROW, place_labels
from fpn_ablate.report.html.vega import (
    COLOURS,
    INK,
    LINE,
    MUTED,
    NOISE,
    Chart,
    Point,
    interval_rules,
    interval_tips,
    mean_axis,
    mean_band,
    point_of,
    quantity,
    round_to,
    row_colour,
    row_key,
    seed_tips,
    short_name,
    specification,
    tip,
    valid,
    when_highlighted,
)  # fmt: skip
from fpn_ablate.utils.numbers import is_finite

ADDRESS_SPACE = 100 * 2**30  # bytes that V8 reserves without using them; 64 GiB are too few for vl-convert 1.9
PLACED = {"align": "'left'", "dx": 0, "dy": 0}  # what a label's place sets, and what stands there without one
MAX_EFFECTS = 16  # lines of the chart of effects; above that it shows the first metric only
COSTS = {
    "GFLOPs": ("verify.gflops", 1.0),
    "parameters (millions)": ("verify.params", 1e-6),
    "latency (ms)": ("cost.latency_ms", 1.0),
    "peak memory (MiB)": ("cost.peak_memory_mib", 1.0),
}


def too_little_space() -> str | None:
    """Return why the charts' library cannot run here, or None: its V8 ends the process where it cannot reserve its space."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY or limit >= ADDRESS_SPACE:
        return None
    return f"the address space is limited to {limit / 2**30:.0f} GiB, and charts need {ADDRESS_SPACE >> 30}; see ulimit -v"


def charts(table: Table, colours: Mapping[str, int], steps: int = MAX_STEPS) -> list[Chart | str]:
    """Build a table's charts; for one that cannot be drawn, a line on what is missing. `steps`: points of a learning curve."""
    drawn = [recall(table, colours), effects(table), costs(table, colours), curves(table, colours, steps)]
    drawn += [weights] if (weights := fusion(table, colours)) else []
    return drawn + diagnosis(table, colours, steps)


def row_colours(tables: Iterable[Table]) -> dict[str, dict[str, int]]:
    """Return {table: {row: number of its colour}}.

    A row keeps its colour in all tables, unless two rows of one table would then share it. Only a table
    with more than COLOURS rows repeats colours, first those of rows without runs.
    """
    first: dict[str, int] = {}
    by_table: dict[str, dict[str, int]] = {}
    for table in tables:
        rows = [row for row in table.rows if not row.published_only]
        numbers: dict[str, int] = {}
        for row in sorted(rows, key=lambda row: (len(rows) > COLOURS and not row.states, row.row not in first)):
            free = [n for n in range(COLOURS) if n not in numbers.values()] or [len(numbers) % COLOURS]
            numbers[row.row] = first[row.row] if first.get(row.row) in free else free[0]
        first = numbers | first
        by_table[table.name] = {row.row: numbers[row.row] for row in rows}
    return by_table


def recall(table: Table, colours: Mapping[str, int]) -> Chart | str:
    """Plot AR@100 against the size of the object, in the bins of the first record that has any."""
    points: list[Point] = []
    edges: list[float] = []
    for row in table.finished_rows:
        bins = [record_bins for record in row.finished if (record_bins := _bins(record))]
        edges = edges or (bins[0][0] if bins else [])
        bins = [(objects, values) for own_edges, objects, values in bins if own_edges == edges]
        for number, (low, high) in enumerate(pairwise([edges[0] / 2**0.5, *edges, edges[-1] * 2**0.5]) if bins else ()):
            if values := [100 * values[number] for _, values in bins if values[number] is not None]:
                size = f"{low:.0f}–{high:.0f} px" if number else f"under {high:.0f} px"
                size = size if number < len(edges) else f"over {low:.0f} px"
                point = {"side": math.sqrt(low * high), "size": size, "objects": bins[0][0][number]}
                points.append(point_of(row, colours, values) | point)
    if not points:
        fix = "no record has it. python -m fpn_ablate artifacts RUNS adds it."
        return f"Recall against object size: {fix if any(row.finished for row in table.rows) else 'no run is finished yet.'}"
    first, last = min(point["side"] for point in points), max(point["side"] for point in points)
    axis = {"values": [2**k for k in range(1, 13) if first <= 2**k <= last], "grid": False}
    x = quantity("side", "side of the object, √area (px, log scale)", scale={"type": "log", "nice": False}, axis=axis)
    tips = [tip("label", "row"), tip("size"), tip("objects"), tip("mean", "AR@100 (%)", ".1f"), *seed_tips(".1f")]
    layers = mean_band("AR@100 (%)", tips)
    if len(edges) > 7:  # small ends at the fifth edge (runs.artifacts.recall_by_size), and large begins at three times its side
        bounds = {"values": [{"side": edges[4]}, {"side": 3 * edges[4]}]}
        dotted = {"type": "rule", "strokeDash": [2, 3], "opacity": 0.6}
        layers.insert(0, {"data": bounds, "mark": dotted, "encoding": {"color": {"value": MUTED}}})
    note = (
        "Line: mean over seeds; band: from the lowest seed to the highest. Dotted: the bounds between small, medium and large."
    )
    spec = specification(points, layers, {"x": x, "color": row_colour(colours)})
    return Chart("recall", "Recall against object size", note, spec)


def _bins(record: Record) -> tuple[list[float], list[int], list[float | None]] | None:
    """Return the size bins of a record (edges, objects, AR@100), or None if it has none or they are inconsistent."""
    parts = [record.get(f"by_size.{key}") for key in ("edges", "objects", "AR100")]
    if not all(isinstance(part, list) for part in parts) or not parts[0]:
        return None
    edges, objects, values = parts
    numbers = all(is_finite(edge) and edge > 0 for edge in edges)
    numbers = numbers and all(value is None or (is_finite(value) and abs(value) < 1e9) for value in values)
    return (edges, objects, values) if numbers and len(objects) == len(values) == len(edges) + 1 else None


def _shares(record: Record) -> dict[str, list[float]]:
    """Return the shares of a record's inputs in each weighted sum, by its name; what is not of that form is left out."""
    items = record.get("fusion")
    pairs = [item for item in items if isinstance(item, list) and len(item) == 2] if isinstance(items, list) else []
    return {
        name: shares
        for name, shares in pairs
        if isinstance(name, str) and isinstance(shares, list) and all(is_finite(share) and abs(share) < 1e9 for share in shares)
    }


def fusion(table: Table, colours: Mapping[str, int]) -> Chart | None:
    """Plot what a neck has learned: the share of each input in each weighted sum, mean over seeds; None without any."""
    points = []
    for row in table.finished_rows:
        of_seeds = [shares for record in row.finished if (shares := _shares(record))]
        for place, inputs in of_seeds[0].items() if of_seeds else ():
            alike = [seed[place] for seed in of_seeds if len(seed.get(place, ())) == len(inputs)]
            for number, shares in enumerate(zip(*alike, strict=True), start=1):
                point = {"row": row_key(row, colours), "label": row.name, "sum": place, "input": number}
                points.append(point | {"share": round_to(100 * fmean(shares)), "n": len(shares)})
    if not points:
        return None
    choices = tuple(dict.fromkeys(point["label"] for point in points))
    tips = [tip("sum"), tip("input"), tip("share", "share (%)", ".1f"), tip("n", "seeds")]
    encoding = {
        "x": quantity("share", "share of the sum (%)", stack="zero", scale={"domain": [0, 100]}),
        "y": {"field": "sum", "type": "nominal", "title": None, "sort": None, "axis": {"labelLimit": 220}},
        "color": {"field": "input", "type": "ordinal", "title": "input"},
    }
    note = "Inputs of a sum in order: the level's own map, then those of the top-down and the bottom-up path, if there are any."
    spec = specification(points, [{"mark": {"type": "bar"}, "encoding": {"tooltip": tips}}], encoding, "label", choices[0])
    return Chart("fusion", "Learned weights of fusion", note, spec, choices, "label")


def costs(table: Table, colours: Mapping[str, int]) -> Chart | str:
    """Plot each row's main metric against its cost."""
    metric, points = table.main_metric, []
    for row in table.finished_rows if metric else ():
        estimate = row.cells[metric.key].ours
        for kind, (key, scale) in COSTS.items():
            values = [value for record in row.finished if is_finite(value := record.get(key))]
            if values and estimate.mean is not None:
                figures = {"value": fmean(values) * scale, "mean": estimate.mean, "low": estimate.low, "high": estimate.high}
                point = {
                    "row": row_key(row, colours),
                    "label": row.name,
                    "short": short_name(row),
                    "cost": kind,
                    "n": estimate.n,
                }
                points.append(point | {key: round_to(value, 4) for key, value in figures.items()})
    if not points:
        what = metric.title if metric else "a metric"
        return f"Cost against accuracy: no finished run has {what} and one of {', '.join(COSTS)}."
    for kind in COSTS:
        place_labels([point for point in points if point["cost"] == kind])
    choices, title = tuple(dict.fromkeys(point["cost"] for point in points)), metric.title
    tips = [tip("label", "row"), tip("value", "cost", ",.2f"), tip("mean", title, ".1f"), *interval_tips(".1f")]
    at = "datum.places[narrow ? 1 : 0]"
    place = {key: {"expr": f"{at}.length ? {at}[{n}] : {none}"} for n, (key, none) in enumerate(PLACED.items())}
    y = mean_axis(f"{title} (%)")
    text = {"y": y, "color": {"value": INK}}
    layers = [
        *interval_rules(points, {"strokeWidth": 1.5}, "y"),
        {"mark": {"type": "point", "filled": True, "size": 90}, "encoding": {"y": y, "tooltip": [*tips, tip("n", "seeds")]}},
        {
            "mark": {
                "type": "text",
                "text": {"expr": f"{at}.length ? datum.short : ''"},
                **place,
                "baseline": "middle",
                "fontSize": LABEL_FONT,
                "limit": 170,
            },
            "encoding": text,
        },
    ]
    x = quantity("value", None, scale={"zero": False, "nice": True, "padding": 16}, axis={"grid": False, "tickCount": 6})
    encoding = {"x": x, "color": row_colour(colours), "opacity": when_highlighted(1, 0.15)}
    note = f"Up is better, left is cheaper. {title} with its 95 % interval where there is one."
    spec = specification(points, layers, encoding, "cost", choices[0])
    spec["params"].append({"name": "narrow", "expr": f"width < {NARROW}"})
    return Chart("costs", "Cost against accuracy", note, spec, choices, "cost")


def effects(table: Table) -> Chart | str:
    """Plot the differences of rows and their intervals beside the published ones."""
    points = _effect_points(table)
    if not points:
        return "Effect sizes: no claim or effect has a seed for which all its rows are finished."
    published, noise = (any(point[key] is not None for point in points) for key in ("published", "noise"))
    tips = [tip("title", "claim"), tip("metric"), tip("contrast"), tip("mean", "ours", "+.1f"), *interval_tips("+.1f")]
    tips += [tip("published", "published", "+.1f"), tip("noise", "noise floor", ".1f"), tip("verdict"), tip("n", "seeds")]
    shade = {"condition": {"test": "datum.within", "value": 0.45}, "value": 1}
    text = {"type": "text", "align": "left", "baseline": "middle", "fontSize": 11.5, "limit": {"expr": "width"}}
    text |= {"dx": 4, "dy": -11}
    line = {"x": {"value": 0}, "text": {"field": "line"}}
    below = {"yOffset": 9}  # of the line's text
    ours = {"type": "point", "filled": True, "fill": "var(--c0)", "size": 70}
    hollow = {"type": "point", "shape": "diamond", "size": 80, "stroke": "var(--c1)", "strokeWidth": 1.8, "fill": None}
    zero = {"type": "tick", "orient": "vertical", "size": 20, "thickness": 1, "color": MUTED, **below}
    mean = quantity("mean", "difference (points)", axis={"tickCount": 7, "grid": False})  # it would run through the text
    layers = [
        {"mark": zero, "encoding": {"x": {"datum": 0, "type": "quantitative"}}},
        {"mark": text | {"fill": INK}, "encoding": line | {"tooltip": tips}},
        *interval_rules(points, {"stroke": "var(--c0)", "strokeWidth": 2, **below}, "x", {"opacity": shade}),
        {"mark": ours | below, "encoding": {"x": mean, "opacity": shade, "tooltip": tips}},
    ]
    if noise:
        ends = [{"calculate": f"{sign}datum.noise", "as": side} for sign, side in (("-", "left"), ("", "right"))]
        band = {"x": quantity("left"), "x2": {"field": "right"}}
        mark = {"type": "bar", "fill": NOISE, "height": 14, **below}
        layers.insert(0, {"transform": [valid("noise"), *ends], "mark": mark, "encoding": band})
    if published:
        encoding = {"x": quantity("published"), "tooltip": tips}
        layers.append({"transform": [valid("published")], "mark": hollow | below | {"opacity": 1}, "encoding": encoding})
    spec = specification(points, layers, {"y": {"field": "at", "type": "ordinal", "axis": None, "sort": None}})
    note = "Dot and line: ours with its 95 % interval."
    if published:
        other = "" if table.same_data else f" on other data ({table.definition.paper.data})"
        note += f" Hollow diamond: published{other}."
    note += " Grey: differences between equal rows; pale: an effect within them." if noise else ""
    icons = [f"{icon} {verdict}" for verdict, icon in ICONS.items() if any(point["verdict"] == verdict for point in points)]
    note += f" {', '.join(icons)}." if icons else ""
    return Chart("effects", "Effect sizes", note, spec | {"height": LINE * len(points)})


def _effect_points(table: Table) -> list[Point]:
    """Return the differences of the claims, then the effects of the definition."""
    names = [spec.names[0] for spec in table.definition.rows]
    rows = {row.row: row for row in table.rows} | dict(zip(names, table.rows, strict=False))
    titles = {metric.key: metric.title for metric in table.definition.metrics}
    points = []
    for verdict in table.verdicts:
        claim = verdict.claim
        if verdict.contrast is not None and not claim.ratio:  # whose axis is another
            plus, minus = (" & ".join(short_name(rows[name]) for name in side) for side in (claim.plus, claim.minus))
            metric = titles[claim.metric] + (f" beyond {titles[claim.less]}" if claim.less else "")
            texts = clean(claim.text), f"{plus} − {minus}", clean(metric), verdict.verdict
            points.append(_effect_point(verdict.contrast, *texts, published=verdict.published))
    metrics = [metric for metric in table.definition.metrics if metric.source is None and metric.plot]
    claimed = {name for verdict in table.verdicts for name in (*verdict.claim.plus, *verdict.claim.minus)}
    shown = [effect for effect in table.effects if effect.row not in claimed]  # a claim says more of a difference
    for effect in shown:
        for metric in metrics if len(metrics) * len(shown) <= MAX_EFFECTS else metrics[:1]:
            cell = effect.cells[metric.key]
            if cell.ours.n:
                texts = clean(effect.title), "", clean(metric.title), "effect"
                points.append(_effect_point(cell, *texts, published=cell.published))
    return [point | {"at": number} for number, point in enumerate(points)]


def _effect_point(contrast: Contrast, title: str, sides: str, metric: str, verdict: str, published: float | None) -> Point:
    ours = contrast.ours
    values = {"mean": ours.mean, "low": ours.low, "high": ours.high, "published": published, "noise": contrast.noise}
    # Of a line that is too long the end is cut: the metric and the rows, which tell equal claims apart, come first.
    text = f"{metric}, {sides}: {title}" if sides else f"{title} · {metric}"
    line = f"{ICONS.get(verdict, '')}  {text}".strip()
    return {
        **{"title": title, "contrast": sides, "metric": metric},
        **{key: round_to(value) for key, value in values.items()},
        **{"within": contrast.within_noise, "n": ours.n, "verdict": verdict, "line": line},
    }

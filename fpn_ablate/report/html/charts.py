"""Charts of the page and of the figures: one function a chart, which returns a Vega-Lite specification, or why there is none.

A specification holds its points (fpn_ablate.report.formats.series); its parameters are `highlight`, a row as
r0, r1, ..., and `choice`. Colours are CSS variables: a change of theme, or printing, also recolours a drawn chart.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fpn_ablate.report.collate.claims import ICONS
from fpn_ablate.report.collate.table import Table
from fpn_ablate.report.formats import series
from fpn_ablate.report.formats.series import Point

Spec = dict[str, Any]
INK, MUTED, FAINT, NOISE, BACKGROUND = "var(--ink)", "var(--muted)", "var(--rule)", "var(--noise)", "var(--bg)"
HEIGHT, LINE = 280, 44  # pixels: of a chart, of a line of the effects
# By name, not as a CSS variable: vega measures the widths of texts where variables are unknown.
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", "Liberation Sans", Arial, sans-serif'
CONFIG = {
    "font": FONT,
    "background": "transparent",
    "view": {"stroke": None},
    "axis": {
        **{"labelColor": MUTED, "titleColor": MUTED, "gridColor": FAINT, "domainColor": FAINT, "tickColor": FAINT},
        **{"titleFontWeight": "normal", "labelFontSize": 11, "titleFontSize": 11, "gridOpacity": 0.7, "titlePadding": 8},
    },
}


@dataclass(frozen=True)
class Chart:
    """A chart: its Vega-Lite specification and its texts. The points are its text alternative.

    The reader sets the specification's parameter `choice` to one of `choices`: points are shown whose `choice_field` is that.
    """

    key: str
    title: str
    note: str
    spec: Spec
    choices: tuple[str, ...] = ()
    choice_field: str = ""


def charts(table: Table, colours: Mapping[str, int], steps: int = series.MAX_STEPS) -> list[Chart | str]:
    """Build a table's charts; for one that cannot be drawn, a line on what is missing. `steps`: points of a learning curve."""
    return [recall(table, colours), effects(table), costs(table, colours), curves(table, colours, steps)]


def recall(table: Table, colours: Mapping[str, int]) -> Chart | str:
    """Plot AR@100 against the size of the object."""
    points = _numbered(series.recall_by_size(table), colours)
    if not points:
        return "Recall against object size: no record has it. python -m fpn_ablate artifacts RUNS adds it."
    first, last = min(point["side"] for point in points), max(point["side"] for point in points)
    axis = {"values": [2**k for k in range(1, 13) if first <= 2**k <= last], "grid": False}
    x = _number("side", "side of the object, √area (px, log scale)", scale={"type": "log", "nice": False}, axis=axis)
    tips = [_tip("label", "row"), _tip("size"), _tip("objects"), _tip("mean", "AR@100 (%)", ".1f"), *_seeds(".1f")]
    bounds = [{"side": bound} for bound in series.size_bounds(table)]
    dotted = {"type": "rule", "strokeDash": [2, 3], "opacity": 0.6}
    rules = {"data": {"values": bounds}, "mark": dotted, "encoding": {"color": {"value": MUTED}}}
    layers = [*([rules] if bounds else []), *_band("AR@100 (%)", tips)]
    note = (
        "Line: mean over seeds; band: from the lowest seed to the highest. Dotted: the bounds between small, medium and large."
    )
    spec = _spec(points, layers, {"x": x, "color": _colour(colours)})
    return Chart("recall", "Recall against object size", note, spec)


def curves(table: Table, colours: Mapping[str, int], steps: int = series.MAX_STEPS) -> Chart | str:
    """Plot one loss at a time against the step."""
    points = _numbered(series.losses(table, steps), colours)
    if not points:
        return "Learning curves: the folders of the runs, with their metrics.jsonl, are not on this disk."
    choices = tuple(dict.fromkeys(point["loss"] for point in points))
    tips = [_tip("label", "row"), _tip("loss"), _tip("step"), _tip("mean", "loss", ".4f"), *_seeds(".4f")]
    x = _number("step", "step", axis={"grid": False, "tickCount": 6})
    spec = _spec(points, _band("loss", tips, dots=4), {"x": x, "color": _colour(colours)}, "loss", choices[0])
    note = "Line: mean over seeds; band: from the lowest seed to the highest."
    return Chart("curves", "Learning curves", note, spec, choices, "loss")


def costs(table: Table, colours: Mapping[str, int]) -> Chart | str:
    """Plot each row's main metric against its cost."""
    points = _numbered(series.costs(table), colours)
    if not points:
        return "Cost against accuracy: no record has both."
    choices, title = tuple(dict.fromkeys(point["cost"] for point in points)), table.main_metric.title
    tips = [_tip("label", "row"), _tip("value", "cost", ",.2f"), _tip("mean", title, ".1f"), *_interval(".1f")]
    side = {"align": {"expr": "datum.right ? 'right' : 'left'"}, "dx": {"expr": "datum.right ? -7 : 7"}}
    y = _y(f"{title} (%)")
    text = {"y": y, "text": {"field": "short"}, "color": {"value": INK}}
    layers = [
        *_intervals(points, {"strokeWidth": 1.5}, "y"),
        {"mark": {"type": "point", "filled": True, "size": 90}, "encoding": {"y": y, "tooltip": [*tips, _tip("n", "seeds")]}},
        {"mark": {"type": "text", **side, "dy": -9, "fontSize": 11, "limit": 170}, "encoding": text},
    ]
    x = _number("value", None, scale={"zero": False, "nice": True, "padding": 16}, axis={"grid": False, "tickCount": 6})
    encoding = {"x": x, "color": _colour(colours), "opacity": _when_highlighted(1, 0.15)}
    note = f"Up is better, left is cheaper. {title} with its 95 % interval where there is one."
    spec = _spec(points, layers, encoding, "cost", choices[0])
    return Chart("costs", "Cost against accuracy", note, spec, choices, "cost")


def effects(table: Table) -> Chart | str:
    """Plot the differences of rows and their intervals beside the published ones."""
    points = series.effects(table)
    if not points:
        return "Effect sizes: no claim or effect has a seed for which all its rows are finished."
    for point in points:
        metric = f"{point['metric']}, {point['contrast']}" if point["contrast"] else point["metric"]
        point["line"] = f"{ICONS.get(point['verdict'], '')}  {point['title']} · {metric}".strip()
    published, noise = (any(point[key] is not None for point in points) for key in ("published", "noise"))
    tips = [_tip("title", "claim"), _tip("metric"), _tip("contrast"), _tip("mean", "ours", "+.1f"), *_interval("+.1f")]
    tips += [_tip("published", "published", "+.1f"), _tip("noise", "noise floor", ".1f"), _tip("verdict"), _tip("n", "seeds")]
    shade = {"condition": {"test": "datum.within", "value": 0.45}, "value": 1}
    text = {"type": "text", "align": "left", "baseline": "middle", "fontSize": 11.5, "limit": {"expr": "width"}}
    text |= {"dx": 4, "dy": -11}
    line = {"x": {"value": 0}, "text": {"field": "line"}}
    below = {"yOffset": 9}  # of the line's text
    ours = {"type": "point", "filled": True, "fill": "var(--c0)", "size": 70}
    hollow = {"type": "point", "shape": "diamond", "size": 80, "stroke": "var(--c1)", "strokeWidth": 1.8, "fill": None}
    zero = {"x": _number("zero"), "y": {"value": 0}, "y2": {"value": {"expr": "height"}}}
    mean = _number("mean", "difference (points)", axis={"tickCount": 7})
    layers = [
        {"data": {"values": [{"zero": 0}]}, "mark": {"type": "rule", "stroke": MUTED}, "encoding": zero},
        {"mark": text | {"stroke": BACKGROUND, "strokeWidth": 5, "strokeJoin": "round"}, "encoding": line},
        {"mark": text | {"fill": INK}, "encoding": line | {"tooltip": tips}},
        *_intervals(points, {"stroke": "var(--c0)", "strokeWidth": 2, **below}, "x", {"opacity": shade}),
        {"mark": ours | below, "encoding": {"x": mean, "opacity": shade, "tooltip": tips}},
    ]
    if noise:
        ends = [{"calculate": f"{sign}datum.noise", "as": side} for sign, side in (("-", "left"), ("", "right"))]
        band = {"x": _number("left"), "x2": {"field": "right"}}
        mark = {"type": "bar", "fill": NOISE, "height": 14, **below}
        layers.insert(0, {"transform": [_valid("noise"), *ends], "mark": mark, "encoding": band})
    if published:
        encoding = {"x": _number("published"), "tooltip": tips}
        layers.append({"transform": [_valid("published")], "mark": hollow | below | {"opacity": 1}, "encoding": encoding})
    spec = _spec(points, layers, {"y": {"field": "at", "type": "ordinal", "axis": None, "sort": None}})
    note = "Dot and line: ours with its 95 % interval."
    if published:
        other = "" if table.same_data else f" on other data ({table.definition.paper.data})"
        note += f" Hollow diamond: published{other}."
    note += " Grey: differences between equal rows; pale: an effect within them." if noise else ""
    note += " ✓ supported, ✗ contradicted, ? inconclusive." if table.verdicts else ""
    return Chart("effects", "Effect sizes", note, spec | {"height": LINE * len(points)})


def _spec(points: list[Point], layers: list[Spec], encoding: Spec, choice_field: str = "", choice: str = "") -> Spec:
    """Combine layers into a specification as wide as its container, without the schema's URL: the page names no network."""
    chosen = [{"filter": f"datum.{choice_field} === choice"}] if choice_field else []
    params = [{"name": "highlight", "value": ""}, {"name": "choice", "value": choice}]
    size = {"width": "container", "height": HEIGHT, "autosize": {"type": "fit-x", "contains": "padding"}}
    data = {"data": {"values": points}, "transform": chosen, "params": params}
    return data | size | {"encoding": encoding, "layer": layers, "config": CONFIG}


def _band(title: str, tips: list[Spec], dots: int = 26) -> list[Spec]:
    """Draw each row as a line through its means, with dots, and a band between its extremes."""
    y, opacity = _y(title), _when_highlighted(1, 0.12)
    area = {"y": _number("low"), "y2": {"field": "high"}, "opacity": _when_highlighted(0.15, 0.02)}
    return [
        {"mark": {"type": "area", "strokeWidth": 0}, "encoding": area},
        {"mark": {"type": "line", "strokeWidth": 1.8}, "encoding": {"y": y, "opacity": opacity}},
        {"mark": {"type": "point", "filled": True, "size": dots}, "encoding": {"y": y, "opacity": opacity, "tooltip": tips}},
    ]


def _intervals(points: list[Point], mark: Spec, along: str, more: Spec | None = None) -> list[Spec]:
    """Draw intervals if any point has one: a layer without a value would have no scale."""
    ends = {along: _number("low"), f"{along}2": {"field": "high"}}
    layer = {"transform": [_valid("low")], "mark": {"type": "rule", **mark}, "encoding": ends | (more or {})}
    return [layer] if any(point["low"] is not None for point in points) else []


def _number(field: str, *title: str | None, **more: Any) -> Spec:
    return {"field": field, "type": "quantitative", **({"title": title[0]} if title else {}), **more}


def _y(title: str) -> Spec:
    return _number("mean", title, scale={"zero": False, "nice": True}, axis={"tickCount": 6})


def _numbered(points: list[Point], colours: Mapping[str, int]) -> list[Point]:
    """Replace the names of rows by r0, r1, ...: vega groups by them, and breaks on names such as `__proto__`."""
    numbers = {row: f"r{number}" for number, row in enumerate(colours)}
    return [point | {"row": numbers[point["row"]]} for point in points]


def _colour(colours: Mapping[str, int]) -> Spec:
    scale = {"domain": [f"r{row}" for row in range(len(colours))], "range": [f"var(--c{c})" for c in colours.values()]}
    return {"field": "row", "type": "nominal", "scale": scale, "legend": None}


def _when_highlighted(on: float, off: float) -> Spec:
    return {"condition": {"test": "highlight === '' || highlight === datum.row", "value": on}, "value": off}


def _valid(field: str) -> Spec:
    return {"filter": {"field": field, "valid": True}}


def _tip(field: str, title: str = "", form: str = "") -> Spec:
    kind = {"type": "quantitative", "format": form} if form else {"type": "nominal"}
    return {"field": field, "title": title or field, **kind}


def _interval(form: str) -> list[Spec]:
    return [_tip("low", "95 % from", form), _tip("high", "to", form)]


def _seeds(form: str) -> list[Spec]:
    return [_tip("low", "lowest seed", form), _tip("high", "highest seed", form), _tip("n", "seeds")]

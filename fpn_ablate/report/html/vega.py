"""Parts of Vega-Lite specifications that the charts share, in the page's colours."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from fpn_ablate.report.collate.table import Row, clean

Spec = dict[str, Any]
Point = dict[str, Any]
INK, MUTED, FAINT, NOISE = "var(--ink)", "var(--muted)", "var(--rule)", "var(--noise)"
COLOURS = 16  # --c0 to --c15 of page.css
HEIGHT, LINE = 280, 44  # pixels: of a chart, of a line of the effects
# By name, not as a CSS variable: vega measures the widths of texts where variables are unknown.
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", "Liberation Sans", Arial, sans-serif'
# A single value keeps its digits: vega rounds labels to the distance of two, and 0.548 to 1.
SINGLE = "domain('axis')[1] - domain('axis')[0] === 0 ? format(datum.value, '~g') : datum.label"
CONFIG = {
    "font": FONT,
    "background": "transparent",
    "view": {"stroke": None},
    "axis": {
        **{"labelColor": MUTED, "titleColor": MUTED, "gridColor": FAINT, "domainColor": FAINT, "tickColor": FAINT},
        **{"titleFontWeight": "normal", "labelFontSize": 11, "titleFontSize": 11, "gridOpacity": 0.7, "titlePadding": 8},
        "labelSeparation": 8,  # pixels; of labels that are nearer every other one is left out
    },
    **{f"axis{x.upper()}Quantitative": {"labelExpr": SINGLE.replace("axis", x)} for x in "xy"},
    "legend": {"labelColor": MUTED, "titleColor": MUTED},
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


def point_of(row: Row, colours: Mapping[str, int], values: list[float], digits: int = 2) -> Point:
    """Return a point of a row: mean, lowest and highest of the values of its seeds."""
    spread = {"mean": fmean(values), "low": min(values), "high": max(values)}
    rounded = {key: round_to(value, digits) for key, value in spread.items()}
    return {"row": row_key(row, colours), "label": row.name, **rounded, "n": len(values)}


def row_key(row: Row, colours: Mapping[str, int]) -> str:
    """Return r0, r1, ...: vega groups by the names of rows, and breaks on such as `__proto__`."""
    return f"r{list(colours).index(row.row)}"


def short_name(row: Row) -> str:
    return f"({row.letter})" if row.letter else clean(row.label)


def round_to(value: float | None, digits: int = 2) -> float | None:
    return None if value is None else round(value, digits)


def specification(points: list[Point], layers: list[Spec], encoding: Spec, choice_field: str = "", choice: str = "") -> Spec:
    """Combine layers into a specification as wide as its container, without the schema's URL: the page names no network."""
    chosen = [{"filter": f"datum.{choice_field} === choice"}] if choice_field else []
    params = [{"name": "highlight", "value": ""}, {"name": "choice", "value": choice}]
    size = {"width": "container", "height": HEIGHT, "autosize": {"type": "fit-x", "contains": "padding"}}
    data = {"data": {"values": points}, "transform": chosen, "params": params}
    return data | size | {"encoding": encoding, "layer": layers, "config": CONFIG}


def mean_band(title: str, tips: list[Spec], dots: int = 26) -> list[Spec]:
    """Draw each row as a line through its means, with dots, and a band between its extremes."""
    y, opacity = mean_axis(title), when_highlighted(1, 0.12)
    area = {"y": quantity("low"), "y2": {"field": "high"}, "opacity": when_highlighted(0.15, 0.02)}
    return [
        {"mark": {"type": "area", "strokeWidth": 0}, "encoding": area},
        {"mark": {"type": "line", "strokeWidth": 1.8}, "encoding": {"y": y, "opacity": opacity}},
        {"mark": {"type": "point", "filled": True, "size": dots}, "encoding": {"y": y, "opacity": opacity, "tooltip": tips}},
    ]


def interval_rules(points: list[Point], mark: Spec, along: str, more: Spec | None = None) -> list[Spec]:
    """Draw intervals if any point has one: a layer without a value would have no scale."""
    ends = {along: quantity("low"), f"{along}2": {"field": "high"}}
    layer = {"transform": [valid("low")], "mark": {"type": "rule", **mark}, "encoding": ends | (more or {})}
    return [layer] if any(point["low"] is not None for point in points) else []


def quantity(field: str, *title: str | None, **more: Any) -> Spec:
    return {"field": field, "type": "quantitative", **({"title": title[0]} if title else {}), **more}


def mean_axis(title: str) -> Spec:
    return quantity("mean", title, scale={"zero": False, "nice": True}, axis={"tickCount": 6})


def row_colour(colours: Mapping[str, int]) -> Spec:
    scale = {"domain": [f"r{row}" for row in range(len(colours))], "range": [f"var(--c{c})" for c in colours.values()]}
    return {"field": "row", "type": "nominal", "scale": scale, "legend": None}


def when_highlighted(on: float, off: float) -> Spec:
    return {"condition": {"test": "highlight === '' || highlight === datum.row", "value": on}, "value": off}


def valid(field: str) -> Spec:
    return {"filter": {"field": field, "valid": True}}


def tip(field: str, title: str = "", form: str = "") -> Spec:
    kind = {"type": "quantitative", "format": form} if form else {"type": "nominal"}
    return {"field": field, "title": title or field, **kind}


def interval_tips(form: str) -> list[Spec]:
    return [tip("low", "95 % from", form), tip("high", "to", form)]


def seed_tips(form: str) -> list[Spec]:
    return [tip("low", "lowest seed", form), tip("high", "highest seed", form), tip("n", "seeds")]

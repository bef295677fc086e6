"""The page's charts, as Vega-Lite specifications: one function a chart, or one line on why there is none.

A specification is drawn up once, and filled with each table's points. Colours are names of CSS variables: the page's theme,
and its print, reach into a chart that is drawn.
"""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from fpn_ablate.report import series
from fpn_ablate.report.collate import Table
from fpn_ablate.report.series import Point

if TYPE_CHECKING:
    import altair as alt

INK, MUTED, FAINT, NOISE, PAPER = "var(--ink)", "var(--muted)", "var(--rule)", "var(--noise)", "var(--bg)"
LIT = "highlight === '' || highlight === datum.row"
ICONS = {"supported": "✓  ", "contradicted": "✗  ", "inconclusive": "?  ", "effect": ""}
HEIGHT, LINE = 280, 44  # pixels: of a chart, and of a line of the effects
# By name, not as a variable: widths of texts are measured where variables are not known.
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
    """`choices`: values of the specification's parameter `choice`, which the reader sets. `summary` is the text alternative."""

    key: str
    title: str
    note: str
    spec: dict[str, Any]
    summary: str
    choices: tuple[str, ...] = ()
    choice_label: str = ""


def charts(table: Table, colours: Mapping[str, int]) -> list[Chart | str]:
    """All of a table's charts; in place of one that cannot be drawn, what is missing."""
    return [recall(table, colours), effects(table), costs(table, colours), curves(table, colours)]


def recall(table: Table, colours: Mapping[str, int]) -> Chart | str:
    """AR@100 against the size of the object."""
    points = series.recall_by_size(table)
    if not points:
        return "Recall against object size: no record has it; python -m fpn_ablate.exhibits RUNS makes it."
    first, last = min(point["side"] for point in points), max(point["side"] for point in points)
    sides = tuple(2**k for k in range(1, 13) if first <= 2**k <= last)
    bounds = [{"side": bound} for bound in series.size_bounds(table)]
    spec = _filled(_recall(sides, bool(bounds)), _coloured(points, colours), bounds=bounds)
    note = "Line: mean over seeds; band: from the lowest seed to the highest. Dotted: where small ends and large begins."
    return Chart("recall", "Recall against object size", note, spec, _ends(points, "side", "px", "AR@100 %"))


def curves(table: Table, colours: Mapping[str, int]) -> Chart | str:
    """Losses by step, one at a time."""
    points = series.losses(table)
    if not points:
        return "Learning curves: the folders of the runs, with their metrics.jsonl, are not on this disk."
    choices = tuple(dict.fromkeys(point["loss"] for point in points))
    first = [point for point in points if point["loss"] == choices[0]]
    note = "Line: mean over seeds; band: from the lowest seed to the highest."
    spec = _filled(_curves(), _coloured(points, colours), choices[0])
    return Chart("curves", "Learning curves", note, spec, _ends(first, "step", "steps", choices[0]), choices, "loss")


def costs(table: Table, colours: Mapping[str, int]) -> Chart | str:
    """What a row costs, against what it achieves."""
    points = series.costs(table)
    if not points:
        return "Cost against accuracy: no record has both."
    choices, title = tuple(dict.fromkeys(point["kind"] for point in points)), series.first_metric(table).title
    first = [point for point in points if point["kind"] == choices[0]]
    summary = "; ".join(f"{p['label']}: {p['cost']:g} {choices[0]}, {title} {p['mean']:.1f}" for p in first)
    note = f"Upwards is better, to the left is cheaper. {title} with its 95 % interval where there is one."
    spec = _filled(_costs(title, **_known(points, "low")), _coloured(points, colours), choices[0])
    return Chart("costs", "Cost against accuracy", note, spec, summary, choices, "cost")


def effects(table: Table) -> Chart | str:
    """Differences of rows with their intervals, beside the published ones."""
    points = series.effects(table)
    if not points:
        return "Effect sizes: no claim or effect has a seed that all its rows have finished."
    for point in points:
        metric = f"{point['metric']}, {point['contrast']}" if point["contrast"] else point["metric"]
        point["line"] = f"{ICONS[point['verdict']]}{point['title']} · {metric}"
    known = _known(points, "low", "published", "noise")
    spec = _filled(_effects(**known), points) | {"height": LINE * len(points)}
    note = "Dot and line: ours with its 95 % interval."
    if known["published"]:
        other = "" if table.same_data else f" on other data ({table.definition.paper.data})"
        note += f" Hollow diamond: published{other}."
    note += " Grey: what equal rows differ by; pale: an effect within that." if known["noise"] else ""
    note += " ✓ supported, ✗ contradicted, ? inconclusive." if table.verdicts else ""
    return Chart("effects", "Effect sizes", note, spec, "; ".join(map(_effect_words, points)))


@lru_cache
def _recall(sides: tuple[int, ...], bounds: bool) -> dict[str, Any]:
    import altair as alt

    scale, axis = alt.Scale(type="log", nice=False), alt.Axis(values=list(sides), grid=False)
    x = alt.X("side:Q", scale=scale, axis=axis, title="side of the object, √area (px, log scale)")
    tips = [_tip("label", "row"), _tip("size"), _tip("objects"), _tip("mean", "AR@100 (%)", ".1f"), *_seeds(".1f")]
    rules = alt.Chart(alt.NamedData("bounds")).mark_rule(strokeDash=[2, 3], stroke=MUTED, opacity=0.6).encode(x="side:Q")
    return _template([*([rules] if bounds else []), *_band(x, "AR@100 (%)", tips)])


@lru_cache
def _curves() -> dict[str, Any]:
    import altair as alt

    x = alt.X("step:Q", axis=alt.Axis(grid=False, tickCount=6), title="step")
    tips = [_tip("label", "row"), _tip("loss"), _tip("step"), _tip("mean", "loss", ".4f"), *_seeds(".4f")]
    layers = [layer.transform_filter("datum.loss === choice") for layer in _band(x, "loss", tips, dots=4)]
    return _template(layers, choice=True)


@lru_cache
def _costs(title: str, low: bool) -> dict[str, Any]:
    import altair as alt

    scale = alt.Scale(zero=False, nice=True, padding=16)
    x = alt.X("cost:Q", scale=scale, axis=alt.Axis(grid=False, tickCount=6), title=None)
    tips = [
        _tip("label", "row"),
        _tip("cost", "cost", ",.2f"),
        _tip("mean", title, ".1f"),
        *_interval(".1f"),
        _tip("n", "seeds"),
    ]
    base = alt.Chart(alt.NamedData("points")).transform_filter("datum.kind === choice")
    base = base.encode(x=x, color=_colour(), opacity=_lit(1, 0.15))
    side = {"align": alt.expr("datum.right ? 'right' : 'left'"), "dx": alt.expr("datum.right ? -7 : 7")}
    names, y = base.mark_text(**side, dy=-9, fontSize=11, limit=170), _y(f"{title} (%)")
    bars = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=1.5).encode(y="low:Q", y2="high:Q")
    return _template(
        [
            *([bars] if low else []),
            base.mark_point(filled=True, size=90, opacity=1).encode(y=y, tooltip=tips),
            names.encode(y=y, text="short:N", color=alt.value(INK)),
        ],
        choice=True,
    )


@lru_cache
def _effects(low: bool, published: bool, noise: bool) -> dict[str, Any]:
    import altair as alt

    base = alt.Chart(alt.NamedData("points")).encode(y=alt.Y("at:O", axis=None, sort=None))
    x = alt.X("mean:Q", title="difference (points)", axis=alt.Axis(tickCount=7))
    tips = [_tip("title", "claim"), _tip("metric"), _tip("contrast"), _tip("mean", "ours", "+.1f"), *_interval("+.1f")]
    tips += [_tip("published", "published", "+.1f"), _tip("noise", "noise floor", ".1f"), _tip("verdict"), _tip("n", "seeds")]
    shade = alt.when("datum.within").then(alt.value(0.45)).otherwise(alt.value(1))
    noisy = base.transform_filter("isValid(datum.noise)").transform_calculate(left="-datum.noise", right="datum.noise")
    ours, text = (
        "var(--c0)",
        {"align": "left", "baseline": "middle", "dx": 4, "dy": -11, "fontSize": 11.5, "limit": alt.expr("width")},
    )
    diamonds = base.transform_filter("isValid(datum.published)")
    bars = base.transform_filter("isValid(datum.low)").mark_rule(stroke=ours, strokeWidth=2, yOffset=9)
    layers = [noisy.mark_bar(fill=NOISE, height=14, yOffset=9).encode(x="left:Q", x2="right:Q")] if noise else []
    layers += [
        alt.Chart(alt.NamedData("bounds")).mark_rule(stroke=MUTED).encode(x="zero:Q"),
        base.mark_text(**text, stroke=PAPER, strokeWidth=5, strokeJoin="round").encode(x=alt.value(0), text="line:N"),
        base.mark_text(**text, fill=INK).encode(x=alt.value(0), text="line:N", tooltip=tips),
        *([bars.encode(x="low:Q", x2="high:Q", opacity=shade)] if low else []),
        base.mark_point(filled=True, fill=ours, size=70, yOffset=9, opacity=1).encode(x=x, opacity=shade, tooltip=tips),
    ]
    hollow = {"shape": "diamond", "size": 80, "stroke": "var(--c1)", "strokeWidth": 1.8, "fill": None}
    layers += [diamonds.mark_point(**hollow, yOffset=9, opacity=1).encode(x="published:Q", tooltip=tips)] if published else []
    return _template(layers)


def _band(x: "alt.X", title: str, tips: list, dots: int = 26) -> list[Any]:
    """Of each row a line through its means, with dots, and a band between its extremes."""
    import altair as alt

    base, y = alt.Chart(alt.NamedData("points")).encode(x=x, detail="row:N", color=_colour()), _y(title)
    return [
        base.mark_area(strokeWidth=0).encode(y=alt.Y("low:Q"), y2="high:Q", opacity=_lit(0.15, 0.02)),
        base.mark_line(strokeWidth=1.8).encode(y=y, opacity=_lit(1, 0.12)),
        base.mark_point(filled=True, size=dots, opacity=1).encode(y=y, opacity=_lit(1, 0.12), tooltip=tips),
    ]


def _colour() -> "alt.Color":
    """The points bring their own."""
    import altair as alt

    return alt.Color("colour:N", scale=None, legend=None)


def _lit(on: float, off: float) -> Any:
    import altair as alt

    return alt.when(LIT).then(alt.value(on)).otherwise(alt.value(off))


def _y(title: str) -> "alt.Y":
    import altair as alt

    return alt.Y("mean:Q", title=title, scale=alt.Scale(zero=False, nice=True), axis=alt.Axis(tickCount=6))


def _tip(field: str, title: str | None = None, form: str | None = None) -> "alt.Tooltip":
    import altair as alt

    return alt.Tooltip(f"{field}:{'Q' if form else 'N'}", title=title or field, **({"format": form} if form else {}))


def _interval(form: str) -> "list[alt.Tooltip]":
    return [_tip("low", "95 % from", form), _tip("high", "to", form)]


def _seeds(form: str) -> "list[alt.Tooltip]":
    return [_tip("low", "lowest seed", form), _tip("high", "highest seed", form), _tip("n", "seeds")]


def _template(layers: list[Any], choice: bool = False) -> dict[str, Any]:
    """The layers as wide as their place, without the address of their schema: the page names no network."""
    import altair as alt

    parameters = [alt.param(name="highlight", value=""), *([alt.param(name="choice", value="")] if choice else [])]
    drawn = alt.layer(*layers).add_params(*parameters).properties(width="container", height=HEIGHT)
    spec = drawn.properties(autosize=alt.AutoSizeParams(type="fit-x", contains="padding")).to_dict()
    return {key: value for key, value in spec.items() if key != "$schema"} | {"config": CONFIG}


def _filled(template: dict[str, Any], points: list[Point], choice: str = "", bounds: Iterable[Point] = ()) -> dict[str, Any]:
    """The specification of one table."""
    spec = deepcopy(template)
    spec["datasets"] = {"points": points, "bounds": list(bounds) or [{"zero": 0}]}
    for parameter in spec["params"]:
        parameter["value"] = choice if parameter["name"] == "choice" else ""
    return spec


def _known(points: list[Point], *keys: str) -> dict[str, bool]:
    """Which of these have a value anywhere: a layer without one would have no scale."""
    return {key: any(point[key] is not None for point in points) for key in keys}


def _coloured(points: list[Point], colours: Mapping[str, int]) -> list[Point]:
    return [point | {"colour": f"var(--c{colours[point['row']]})"} for point in points]


def _effect_words(point: Point) -> str:
    between = "" if point["low"] is None else f" ({point['low']:+.1f} to {point['high']:+.1f})"
    return f"{point['line']}: {point['mean']:+.1f}{between}"


def _ends(points: list[Point], along: str, unit: str, what: str) -> str:
    """First and last value of each row, in words."""
    parts = []
    for row in dict.fromkeys(point["row"] for point in points):
        own = sorted((p for p in points if p["row"] == row), key=lambda p: p[along])
        ends = [f"{p['mean']:.3g} at {p[along]:.0f} {unit}" for p in (own[0], own[-1])]
        parts.append(f"{own[0]['label']}: {' to '.join(ends)}")
    return f"{what}: {'; '.join(parts)}"

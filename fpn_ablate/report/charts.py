"""The page's charts, as Vega-Lite specifications: one function a chart, or one line on why there is none.

Colours are names of CSS variables: the page's theme, and its print, reach into a chart that is drawn.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fpn_ablate.report import series
from fpn_ablate.report.collate import Table
from fpn_ablate.report.series import Point

if TYPE_CHECKING:
    import altair as alt

INK, MUTED, FAINT, NOISE = "var(--ink)", "var(--muted)", "var(--rule)", "var(--noise)"
LIT = "highlight === '' || highlight === datum.row"
ICONS = {"supported": "✓", "contradicted": "✗", "inconclusive": "?", "not run": "–", "effect": "·"}
CONFIG = {
    "font": "var(--sans)",
    "background": None,
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
    legend: bool = True


def charts(table: Table, colours: dict[str, int]) -> list[Chart | str]:
    """All of a table's charts; in place of one that cannot be drawn, what is missing."""
    return [recall(table, colours), effects(table), costs(table, colours), curves(table, colours)]


def recall(table: Table, colours: dict[str, int]) -> Chart | str:
    """AR@100 against the size of the object."""
    import altair as alt

    points = series.recall_by_size(table)
    if not points:
        return "Recall against object size: no record has it; python -m fpn_ablate.exhibits RUNS makes it."
    sides = [2**k for k in range(1, 12) if min(p["side"] for p in points) / 1.5 <= 2**k <= max(p["side"] for p in points) * 1.5]
    axis = alt.Axis(values=sides, grid=False)
    x = alt.X("side:Q", scale=alt.Scale(type="log", nice=False), axis=axis, title="side of the object, √area (px, log scale)")
    tips = [_tip("label", "row"), _tip("size"), _tip("objects"), _tip("mean", "AR@100 (%)", ".1f"), *_seeds(".1f")]
    drawn = _band(points, x, _y("AR@100 (%)", False), colours, tips)
    bounds = alt.Chart(alt.Data(values=[{"side": bound} for bound in series.size_bounds(table)]))
    rules = bounds.mark_rule(strokeDash=[2, 3], stroke=MUTED, opacity=0.6).encode(x="side:Q")
    layers = alt.layer(rules, *drawn) if series.size_bounds(table) else alt.layer(*drawn)
    note = "Line: mean over seeds; band: from the lowest seed to the highest. Dotted: where small ends and large begins."
    return Chart("recall", "Recall against object size", note, _spec(layers, 280), _ends(points, "side", "px", "AR@100 %"))


def curves(table: Table, colours: dict[str, int]) -> Chart | str:
    """Losses by step, one at a time."""
    import altair as alt

    points = series.losses(table)
    if not points:
        return "Learning curves: the folders of the runs, with their metrics.jsonl, are not on this disk."
    choices = tuple(dict.fromkeys(point["loss"] for point in points))
    x = alt.X("step:Q", axis=alt.Axis(grid=False, tickCount=6), title="step")
    tips = [_tip("label", "row"), _tip("loss"), _tip("step"), _tip("mean", "loss", ".4f"), *_seeds(".4f")]
    layers = alt.layer(*_band(points, x, _y("loss", False), colours, tips, dots=False))
    spec = _spec(layers.transform_filter("datum.loss === choice"), 280, choices[0])
    first = [point for point in points if point["loss"] == choices[0]]
    note = "Line: mean over seeds; band: from the lowest seed to the highest."
    return Chart("curves", "Learning curves", note, spec, _ends(first, "step", "steps", choices[0]), choices, "loss")


def costs(table: Table, colours: dict[str, int]) -> Chart | str:
    """What a row costs, against what it achieves."""
    import altair as alt

    points = series.costs(table)
    if not points:
        return "Cost against accuracy: no record has both."
    choices = tuple(dict.fromkeys(point["kind"] for point in points))
    title = series.first_metric(table).title
    x = alt.X("cost:Q", scale=alt.Scale(zero=False, nice=True, padding=24), axis=alt.Axis(grid=False, tickCount=6), title=None)
    y = _y(f"{title} (%)", False)
    tips = [_tip("label", "row"), _tip("cost", "cost", ",.2f"), _tip("mean", title, ".1f"), *_interval(), _tip("n", "seeds")]
    base = alt.Chart(alt.Data(values=points)).encode(x=x, color=_colour(colours), opacity=_lit(1, 0.15))
    lines = base.mark_rule(strokeWidth=1.5).encode(y=alt.Y("low:Q"), y2="high:Q")
    dots = base.mark_point(filled=True, size=90, opacity=1).encode(y=y, tooltip=tips)
    names = base.mark_text(align="left", dx=8, dy=-8, fontSize=11, fill=INK, limit=150).encode(y=y, text="short:N")
    spec = _spec(alt.layer(lines, dots, names).transform_filter("datum.kind === choice"), 280, choices[0])
    first = [point for point in points if point["kind"] == choices[0]]
    summary = "; ".join(f"{p['label']}: {p['cost']:g} {choices[0]}, {title} {p['mean']:.1f}" for p in first)
    note = f"Upwards is better, to the left is cheaper. {title} with its 95 % interval; the cost is chosen above."
    return Chart("costs", "Cost against accuracy", note, spec, summary, choices, "cost")


def effects(table: Table) -> Chart | str:
    """Differences of rows with their intervals, beside the published ones."""
    import altair as alt

    points = series.effects(table)
    if not points:
        return "Effect sizes: no claim or effect has a seed that all its rows have finished."
    for point in points:
        words = [f"{ICONS[point['verdict']]}  {point['title']}", " ".join((point["metric"], point["contrast"])).strip()]
        point["line"] = " · ".join(words)
    base = alt.Chart(alt.Data(values=points)).encode(y=alt.Y("at:O", axis=None, sort=None))
    x = alt.X("mean:Q", title="difference (points)", axis=alt.Axis(tickCount=7, grid=True))
    tips = [_tip("title", "claim"), _tip("metric"), _tip("contrast"), _tip("mean", "ours", "+.1f"), *_interval("+.1f")]
    tips += [_tip("published", "published", "+.1f"), _tip("noise", "noise floor", ".1f"), _tip("verdict"), _tip("n", "seeds")]
    shade = alt.when("datum.within").then(alt.value(0.45)).otherwise(alt.value(1))
    noisy = base.transform_filter("isValid(datum.noise)").transform_calculate(left="-datum.noise", right="datum.noise")
    layers = [
        noisy.mark_bar(fill=NOISE, height=14, yOffset=9).encode(x="left:Q", x2="right:Q"),
        alt.Chart(alt.Data(values=[{"zero": 0}])).mark_rule(stroke=MUTED).encode(x="zero:Q"),
        base.mark_rule(stroke="var(--c0)", strokeWidth=2, yOffset=9).encode(x="low:Q", x2="high:Q", opacity=shade),
        base.mark_point(filled=True, fill="var(--c0)", size=70, yOffset=9, opacity=1).encode(x=x, opacity=shade, tooltip=tips),
        base.transform_filter("isValid(datum.published)")
        .mark_point(shape="diamond", size=80, stroke="var(--c1)", strokeWidth=1.8, fill=None, yOffset=9, opacity=1)
        .encode(x="published:Q", tooltip=tips),
        base.mark_text(align="left", baseline="middle", dy=-11, fontSize=11.5, fill=INK, limit=alt.expr("width"))
        .encode(x=alt.value(0), text="line:N", tooltip=tips),
    ]  # fmt: skip
    spec = _spec(alt.layer(*layers), alt.Step(44))
    other = "" if table.same_data else f" on other data ({table.definition.paper.data})" if table.definition.paper else ""
    note = f"Dot and line: ours with its 95 % interval; hollow diamond: published{other}; grey: what equal rows differ by."
    note += " ✓ supported, ✗ contradicted, ? inconclusive; pale: within the noise." if table.verdicts else ""
    summary = "; ".join(f"{p['line']}: {p['mean']:+.1f} ({p['low']:+.1f} to {p['high']:+.1f}), {p['verdict']}" for p in points)
    return Chart("effects", "Effect sizes", note, spec, summary, legend=False)


def _band(points: list[Point], x: "alt.X", y: "alt.Y", colours: dict[str, int], tips: list, dots: bool = True) -> list[Any]:
    import altair as alt

    base = alt.Chart(alt.Data(values=points)).encode(x=x, color=_colour(colours))
    area = base.mark_area(line=False).encode(alt.Y("low:Q"), y2="high:Q", fill=_colour(colours), opacity=_lit(0.15, 0.02))
    line = base.mark_line(strokeWidth=1.8).encode(y=y, opacity=_lit(1, 0.12))
    points_ = base.mark_point(filled=True, size=26 if dots else 8, opacity=1).encode(y=y, opacity=_lit(1, 0.12), tooltip=tips)
    return [area.encode(stroke=alt.value(None)), line, points_]


def _colour(colours: dict[str, int]) -> "alt.Color":
    import altair as alt

    scale = alt.Scale(domain=list(colours), range=[f"var(--c{number})" for number in colours.values()])
    return alt.Color("row:N", scale=scale, legend=None)


def _lit(on: float, off: float) -> Any:
    import altair as alt

    return alt.when(LIT).then(alt.value(on)).otherwise(alt.value(off))


def _y(title: str, zero: bool) -> "alt.Y":
    import altair as alt

    return alt.Y("mean:Q", title=title, scale=alt.Scale(zero=zero, nice=True), axis=alt.Axis(tickCount=6))


def _tip(field: str, title: str | None = None, form: str | None = None) -> "alt.Tooltip":
    import altair as alt

    kind = "Q" if form else "N"
    return alt.Tooltip(f"{field}:{kind}", title=title or field, **({"format": form} if form else {}))


def _interval(form: str = ".1f") -> "list[alt.Tooltip]":
    return [_tip("low", "95 % from", form), _tip("high", "to", form)]


def _seeds(form: str) -> "list[alt.Tooltip]":
    return [_tip("low", "lowest seed", form), _tip("high", "highest seed", form), _tip("n", "seeds")]


def _spec(chart: Any, height: Any, choice: str | None = None) -> dict[str, Any]:
    """The chart as wide as its place, without the address of its schema: the page names no network."""
    import altair as alt

    parameters = [alt.param(name="highlight", value=""), *([alt.param(name="choice", value=choice)] if choice else [])]
    drawn = chart.add_params(*parameters).properties(width="container", height=height)
    spec = drawn.properties(autosize=alt.AutoSizeParams(type="fit-x", contains="padding")).to_dict()
    spec.pop("$schema")
    return spec | {"config": CONFIG}


def _ends(points: list[Point], along: str, unit: str, what: str) -> str:
    """First and last value of each row, in words."""
    parts = []
    for row in dict.fromkeys(point["row"] for point in points):
        own = sorted((p for p in points if p["row"] == row), key=lambda p: p[along])
        first, last = own[0], own[-1]
        ends = [f"{p['mean']:.3g} at {p[along]:.0f} {unit}" for p in (first, last)]
        parts.append(f"{own[0]['label']}: {' to '.join(ends)}")
    return f"{what}: {'; '.join(parts)}"

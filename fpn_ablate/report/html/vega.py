"""Vega-Lite specifications of the page's charts without their data. Each is built and validated once for all tables.

Their data sets are `points` (fpn_ablate.report.formats.series), `rows` (name and colour of each) and `bounds`; their parameters
are `highlight`, a row, and `choice`. Colours are CSS variables: a change of theme, or printing, also recolours a drawn chart.
"""

from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import altair as alt

INK, MUTED, FAINT, NOISE, PAPER = "var(--ink)", "var(--muted)", "var(--rule)", "var(--noise)", "var(--bg)"
HEIGHT = 280  # pixels
HIGHLIGHTED = "highlight === '' || highlight === datum.row"
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


@lru_cache
def recall(sides: tuple[int, ...], bounds: bool) -> dict[str, Any]:
    import altair as alt

    scale, axis = alt.Scale(type="log", nice=False), alt.Axis(values=list(sides), grid=False)
    x = alt.X("side:Q", scale=scale, axis=axis, title="side of the object, √area (px, log scale)")
    tips = [_tip("label", "row"), _tip("size"), _tip("objects"), _tip("mean", "AR@100 (%)", ".1f"), *_seeds(".1f")]
    rules = alt.Chart(alt.NamedData("bounds")).mark_rule(strokeDash=[2, 3], stroke=MUTED, opacity=0.6).encode(x="side:Q")
    return _template([*([rules] if bounds else []), *_band(x, "AR@100 (%)", tips)])


@lru_cache
def curves() -> dict[str, Any]:
    import altair as alt

    x = alt.X("step:Q", axis=alt.Axis(grid=False, tickCount=6), title="step")
    tips = [_tip("label", "row"), _tip("loss"), _tip("step"), _tip("mean", "loss", ".4f"), *_seeds(".4f")]
    layers = [layer.transform_filter("datum.loss === choice") for layer in _band(x, "loss", tips, dots=4)]
    return _template(layers, choice=True)


@lru_cache
def costs(title: str, low: bool) -> dict[str, Any]:
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
    base = _points().transform_filter("datum.kind === choice")
    base = base.encode(x=x, color=_colour(), opacity=_when_highlighted(1, 0.15))
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
def effects(low: bool, published: bool, noise: bool) -> dict[str, Any]:
    import altair as alt

    base = alt.Chart(alt.NamedData("points")).encode(y=alt.Y("at:O", axis=None, sort=None))
    x = alt.X("mean:Q", title="difference (points)", axis=alt.Axis(tickCount=7))
    tips = [_tip("title", "claim"), _tip("metric"), _tip("contrast"), _tip("mean", "ours", "+.1f"), *_interval("+.1f")]
    tips += [_tip("published", "published", "+.1f"), _tip("noise", "noise floor", ".1f"), _tip("verdict"), _tip("n", "seeds")]
    shade = alt.when("datum.within").then(alt.value(0.45)).otherwise(alt.value(1))
    noisy = base.transform_filter("isValid(datum.noise)").transform_calculate(left="-datum.noise", right="datum.noise")
    ours = "var(--c0)"
    text = {"align": "left", "baseline": "middle", "dx": 4, "dy": -11, "fontSize": 11.5, "limit": alt.expr("width")}
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
    """Draw each row as a line through its means, with dots, and a band between its extremes."""
    import altair as alt

    base, y = _points().encode(x=x, detail="row:N", color=_colour()), _y(title)
    return [
        base.mark_area(strokeWidth=0).encode(y=alt.Y("low:Q"), y2="high:Q", opacity=_when_highlighted(0.15, 0.02)),
        base.mark_line(strokeWidth=1.8).encode(y=y, opacity=_when_highlighted(1, 0.12)),
        base.mark_point(filled=True, size=dots, opacity=1).encode(y=y, opacity=_when_highlighted(1, 0.12), tooltip=tips),
    ]


def _points() -> "alt.Chart":
    """Start a chart of the points, each with its row's name and colour."""
    import altair as alt

    rows = alt.LookupData(alt.NamedData("rows"), key="row", fields=["label", "colour"])
    return alt.Chart(alt.NamedData("points")).transform_lookup(lookup="row", from_=rows)


def _colour() -> "alt.Color":
    import altair as alt

    return alt.Color("colour:N", scale=None, legend=None)


def _when_highlighted(on: float, off: float) -> Any:
    import altair as alt

    return alt.when(HIGHLIGHTED).then(alt.value(on)).otherwise(alt.value(off))


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
    """Combine the layers into a specification as wide as its container, without the schema's URL: the page names no network."""
    import altair as alt

    parameters = [alt.param(name="highlight", value=""), *([alt.param(name="choice", value="")] if choice else [])]
    drawn = alt.layer(*layers).add_params(*parameters).properties(width="container", height=HEIGHT)
    spec = drawn.properties(autosize=alt.AutoSizeParams(type="fit-x", contains="padding")).to_dict()
    return {key: value for key, value in spec.items() if key != "$schema"} | {"config": CONFIG}

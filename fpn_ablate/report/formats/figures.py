"""Draw the page's charts as figures for a paper: the same series in matplotlib, as SVG and PDF."""

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fpn_ablate.report.collate.claims import ICONS
from fpn_ablate.report.collate.table import Table
from fpn_ablate.report.formats import series
from fpn_ablate.report.formats.grid import clean
from fpn_ablate.report.formats.plots import OURS, PAPER, STYLE, WATERMARK

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito, in the order of the page's colours.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")


def render(table: Table) -> dict[str, bytes]:
    """Return {"effects.svg": ..., "effects.pdf": ..., "sizes.svg": ...}, without figures for which the table has no data."""
    import matplotlib

    images = {}
    with matplotlib.rc_context(STYLE | {"pdf.fonttype": 42, "svg.fonttype": "path"}):
        for name, draw in FIGURES.items():
            figure = draw(table)
            if figure is None:
                continue
            _add_title(figure, table)
            for kind, metadata in (("svg", {"Date": None, "Creator": None}), ("pdf", {"CreationDate": None, "Creator": None})):
                buffer = io.BytesIO()
                figure.savefig(buffer, format=kind, metadata=metadata, facecolor="white")
                images[f"{name}.{kind}"] = buffer.getvalue()
    return images


def effects(table: Table) -> "Figure | None":
    """Draw differences with their 95 % intervals, the published ones, and in grey how far equal rows may differ by chance."""
    points = series.effects(table)
    if not points:
        return None
    figure = _figure(7.2, 0.34 * len(points) + 1.3)
    axis = figure.subplots()
    labels = [f"{p['title']}\n{p['contrast']} · {p['metric']}".replace("\n ·", "\n").strip() for p in points]
    for y, point in enumerate(points):
        if point["noise"] is not None:
            axis.fill_betweenx((y - 0.4, y + 0.4), -point["noise"], point["noise"], color="0.88", linewidth=0)
        colour = "0.55" if point["within"] else OURS
        if point["low"] is not None:
            axis.plot((point["low"], point["high"]), (y, y), "-", linewidth=1.4, color=colour)
        axis.plot(point["mean"], y, "o", markersize=5, color=colour, markeredgecolor="white")
        if point["published"] is not None:
            axis.plot(point["published"], y, "D", markersize=5, color=PAPER, markerfacecolor="none")
        axis.text(1.01, y, ICONS.get(point["verdict"], ""), transform=axis.get_yaxis_transform(), va="center")
    axis.axvline(0, color="0.4", linewidth=0.8, zorder=0)
    axis.set_yticks(range(len(points)), labels, fontsize=7)
    axis.set_ylim(len(points) - 0.4, -0.6)
    published = any(point["published"] is not None for point in points)
    hollow = ("; hollow: published" + ("" if table.same_data else ", other data")) if published else ""
    axis.set_xlabel(f"points, with 95 % intervals{hollow}", fontsize=8)
    _plain(axis, "x")
    return figure


def sizes(table: Table) -> "Figure | None":
    """Draw AR@100 by object size; bands: extremes over seeds."""
    points = series.recall_by_size(table)
    if not points:
        return None
    figure = _figure(4.6, 3.4)
    axis = figure.subplots()
    _lines(axis, table, points, "side")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for bound in series.size_bounds(table):
        axis.axvline(bound, color="0.6", linewidth=0.8, linestyle=":")
    axis.set_xlabel("object size (root of its area, px); dotted: small, medium, large")
    axis.set_ylabel("AR@100 (%)")
    return _with_legend(figure, 2)


def curves(table: Table) -> "Figure | None":
    """Draw the losses by step, one panel each; bands: extremes over seeds."""
    from matplotlib.ticker import LogLocator

    points = series.losses(table)
    names = list(dict.fromkeys(point["loss"] for point in points))
    if not points:
        return None
    figure = _figure(3.2 * len(names) + 0.4, 3.2)
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        _lines(axis, table, [point for point in points if point["loss"] == name], "step")
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_minor_formatter("")
        axis.set_title(clean(name), fontsize=8)
        axis.set_xlabel("step")
        axis.tick_params(which="both", length=0, labelsize=7)
    return _with_legend(figure, 3 if len(names) > 1 else 2)


def cost(table: Table) -> "Figure | None":
    """Draw the first metric against each kind of cost."""
    points = series.costs(table)
    kinds = list(dict.fromkeys(point["kind"] for point in points))
    if not points:
        return None
    colours = series.colours([table])[table.name]
    figure = _figure(2.4 * len(kinds) + 0.6, 3.1)
    axes = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axis, kind in zip(axes, kinds, strict=True):
        for point in (p for p in points if p["kind"] == kind):
            colour = PALETTE[colours[point["row"]] % len(PALETTE)]
            if point["low"] is not None:
                axis.plot((point["cost"],) * 2, (point["low"], point["high"]), "-", linewidth=1.1, color=colour)
            style = {"markersize": 5, "color": colour, "markeredgecolor": "white", "linestyle": "none"}
            axis.plot(point["cost"], point["mean"], "o", **style, label=point["label"])
        axis.set_xlabel(kind)
        axis.margins(x=0.15)
        _plain(axis, "both")
    axes[0].set_ylabel(f"{clean(series.first_metric(table).title)} (%)")
    return _with_legend(figure, min(len(kinds), 4))


FIGURES: dict[str, Callable[[Table], Any]] = {"effects": effects, "sizes": sizes, "curves": curves, "cost": cost}


def _lines(axis: Any, table: Table, points: list[series.Point], x: str) -> None:
    """Draw a line and a band for each row."""
    colours = series.colours([table])[table.name]
    for row in dict.fromkeys(point["row"] for point in points):
        of_row = [point for point in points if point["row"] == row]
        colour = PALETTE[colours[row] % len(PALETTE)]
        xs = [point[x] for point in of_row]
        axis.fill_between(xs, [p["low"] for p in of_row], [p["high"] for p in of_row], color=colour, alpha=0.18, linewidth=0)
        axis.plot(xs, [point["mean"] for point in of_row], "-", linewidth=1.3, color=colour, label=of_row[0]["label"])
    _plain(axis, "both")


def _with_legend(figure: "Figure", columns: int) -> "Figure":
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=7, frameon=False)
    return figure


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _plain(axis: Any, grid: str) -> None:
    axis.grid(axis=grid, color="0.92", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(length=0, labelsize=7)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _add_title(figure: "Figure", table: Table) -> None:
    """Add table, data and recipe as the title, and the watermark: a figure may be used without its table."""
    title = clean(f"{table.definition.table} · data {table.data} · recipe {table.recipe}")
    figure.suptitle(title, fontsize=7, color="0.35", wrap=True)
    if table.watermark:
        figure.text(0.5, 0.5, table.watermark, fontsize=26, **WATERMARK)

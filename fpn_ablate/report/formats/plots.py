"""Draw a table as a plot: one panel a metric, one line a row, ours beside the published value."""

import io
from textwrap import wrap
from typing import TYPE_CHECKING

from fpn_ablate.report.collate.definition import Metric
from fpn_ablate.report.collate.table import Table, clean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Blue and vermilion of Okabe and Ito: distinct for colour-blind readers; in grey the markers tell them apart.
OURS, PAPER = "#0072B2", "#D55E00"
MEAN = {"marker": "o", "markersize": 6, "color": OURS, "markeredgecolor": "white", "linestyle": "none"}
SEED = {"marker": "o", "markersize": 3, "color": OURS, "alpha": 0.5, "markeredgewidth": 0, "linestyle": "none"}
HOLLOW = {"marker": "D", "markersize": 5, "color": PAPER, "markerfacecolor": "none", "linestyle": "none"}
MARGIN = 12  # percent of the axis, on either side of the values
WATERMARK = {"color": "0.5", "alpha": 0.16, "ha": "center", "va": "center", "rotation": 14}
STYLE = {
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same bytes on every machine
    "font.size": 9,
    "text.parse_math": False,  # a "$" in a name is a dollar
    "svg.hashsalt": "fpn-ablate",
    "svg.fonttype": "path",
}


def render(table: Table) -> dict[str, bytes]:
    """Return the plot as `{"png": ..., "svg": ...}`; equal tables give equal bytes under one version of matplotlib."""
    import matplotlib

    images = {}
    with matplotlib.rc_context(STYLE):
        figure = draw(table)
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=150, metadata=metadata, facecolor="white")
            images[kind] = buffer.getvalue()
    return images


def draw(table: Table) -> "Figure":
    """Draw small multiples: one panel a metric, with the rows downwards in the table's order."""
    from matplotlib.figure import Figure

    metrics = [metric for metric in table.definition.metrics if metric.plot]
    height = 0.36 * len(table.rows) + 1.9
    figure = Figure(figsize=(2.6 + 1.75 * max(len(metrics), 1), height), layout="constrained")
    axes = figure.subplots(1, max(len(metrics), 1), sharey=True, squeeze=False)[0]
    for axis, metric in zip(axes, metrics, strict=False):
        _panel(axis, table, metric)
    names = [f"{row.name}, {row.state}" if row.shown and not row.seeds else row.name for row in table.rows]
    names = ["\n".join(wrap(name, 36, max_lines=3, placeholder=" …")) for name in names]
    axes[0].set_yticks(range(len(table.rows)), names)
    axes[0].set_ylim(len(table.rows) - 0.4, -0.6)
    heading = f"{table.definition.title}\ndata {table.data}, recipe {table.recipe}"
    characters = int(figure.get_figwidth() / 0.09)  # in this font; a long recipe name would be cut off at both ends
    title = [part for line in heading.split("\n") for part in wrap(clean(line), characters)]
    figure.suptitle("\n".join(title), fontsize=10, fontweight="bold")
    _legend(figure, table)
    if table.watermark:
        figure.text(0.5, 0.5, table.watermark, fontsize=34, **WATERMARK)
    return figure


def _panel(axis: "Axes", table: Table, metric: Metric) -> None:
    axis.set_title(clean(metric.title), fontsize=9)
    axis.grid(axis="x", color="0.9", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(length=0)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    for y in range(1, len(table.rows), 2):
        axis.axhspan(y - 0.5, y + 0.5, color="0.97", linewidth=0, zorder=0)
    cells = [(y, row, row.cells[metric.key]) for y, row in enumerate(table.rows)]
    ours = [(y, cell) for y, _, cell in cells if cell.ours.mean is not None]
    spread = [(y, cell) for y, cell in ours if cell.ours.half_width is not None]
    _dots(axis, [(cell.published, y + 0.22) for y, _, cell in cells if cell.published is not None], HOLLOW)
    _dots(
        axis, [(x, y - 0.28) for y, cell in ours if len(cell.values) > 1 for x in cell.values.values() if x is not None], SEED
    )
    _dots(axis, [(cell.ours.mean, y - 0.03) for y, cell in ours], MEAN)
    for y, cell in spread:
        axis.plot((cell.ours.low, cell.ours.high), (y - 0.03, y - 0.03), "-", linewidth=1.4, color=OURS, zorder=2)
    for y, row, cell in cells:
        if cell.ours.mean is None and not row.published_only:
            state = "n/a" if row.seeds else row.state
            axis.text(0.03, y - 0.12, state, transform=axis.get_yaxis_transform(), color="0.35", fontsize=8, va="center")
    _scale(axis, metric)


def _scale(axis: "Axes", metric: Metric) -> None:
    """Scale the axis to at least 5 percentage points, so that tenths of a point look small; without values draw no ticks."""
    axis.margins(x=MARGIN / 100)
    axis.locator_params(axis="x", nbins=4)
    if not axis.lines:
        axis.set_xticks([])
        return
    low, high = axis.get_xlim()
    if metric.scale == 100:  # few seeds that lie far apart have an interval beyond 0 to 100
        axis.set_xlim(max(low, -MARGIN), min(high, 100 + MARGIN))
    if metric.scale == 100 and high - low < 5:
        start = max((low + high - 5) / 2, min(low, -0.25))  # a share is never below 0
        axis.set_xlim(start, start + 5)


def _dots(axis: "Axes", points: list[tuple[float, float]], style: dict) -> None:
    if points:
        axis.plot(*zip(*points, strict=True), **style, zorder=3)


def _legend(figure: "Figure", table: Table) -> None:
    from matplotlib.lines import Line2D

    label = f"ours on {clean(table.data)}"
    if any(len(row.seeds) > 1 for row in table.rows):
        marks = [Line2D([], [], label=f"{label}: mean with its 95 % interval", **MEAN | {"linestyle": "-"})]
        marks.append(Line2D([], [], label="single seeds", **SEED))
    elif any(cell.ours.half_width is not None for row in table.rows for cell in row.cells.values()):
        marks = [Line2D([], [], label=f"{label}: one seed, 95 % interval over images", **MEAN | {"linestyle": "-"})]
    else:
        marks = [Line2D([], [], label=label, **MEAN)]
    if table.published:
        paper = table.definition.paper
        published = f"{clean(paper.name)} on {clean(paper.data)}" + ("" if table.same_data else " (another data set)")
        marks.append(Line2D([], [], label=published, **HOLLOW))
    figure.legend(handles=marks, loc="outside lower center", ncols=3 if len(figure.axes) > 3 else 1, frameon=False)

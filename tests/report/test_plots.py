"""The plots of a table: every value is there, and nothing hides another."""

import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from fpn_ablate.report.collate.collate import collate
from fpn_ablate.report.collate.records import load
from fpn_ablate.report.formats import plots


def test_plot_marks_generated_data_and_names_survive(runs, put):
    put("$x_{1} <b>&", data="a $\\frac{$", status="finished")
    put("c4", data="a $\\frac{$", status="failed")
    (table,) = collate(load(runs))
    svg = plots.render(table)["svg"].decode()
    ElementTree.fromstring(svg)
    assert "GENERATED DATA" in svg and "<dc:date>" not in svg
    put("fpn", data="real", generated=False, fingerprint="r")
    (real,) = [found for found in collate(load(runs)) if found.data == "real"]
    assert "GENERATED DATA" not in plots.render(real)["svg"].decode()


def test_plot_shows_every_value(runs, put):
    for seed, value in enumerate((0.3, 0.5)):
        put("fpn", seed, metrics={"AR100": value})
    (table,) = collate(load(runs))
    panel = plots.draw(table).axes[0]
    points = sorted({float(x) for line in panel.lines for x in line.get_xdata()})
    published = [row.cells["AR100"].published for row in table.rows]
    cell = next(row for row in table.rows if row.row == "fpn").cells["AR100"]
    ends = [cell.ours.low, cell.ours.high]
    assert points == pytest.approx(sorted({30.0, 50.0, 40.0, *ends, *published}))
    assert [text.get_text() for text in panel.texts] == ["not run"] * 5


def test_a_panel_spans_at_least_5_points_and_one_without_values_has_no_ticks(runs, put):
    put("fpn", 0, table="own", metrics={"AR100": 0.301, "AR1k": 0.002, "AR1k_s": None, "AR1k_m": 0.3, "AR1k_l": 0.1})
    put("c4", 0, table="own", metrics={"AR100": 0.303, "AR1k": 0.001, "AR1k_s": None, "AR1k_m": 0.9, "AR1k_l": None})
    (table,) = collate(load(runs))
    panels = dict(zip([metric.key for metric in table.definition.metrics], plots.draw(table).axes, strict=True))
    spans = {key: panel.get_xlim() for key, panel in panels.items()}
    assert spans["AR100"] == pytest.approx((30.2 - 2.5, 30.2 + 2.5))
    assert spans["AR1k"] == pytest.approx((-0.25, 4.75))
    assert spans["AR1k_m"] == pytest.approx((30 - 7.2, 90 + 7.2))
    assert [key for key, panel in panels.items() if not len(panel.get_xticks())] == ["AR1k_s"]


def test_an_interval_beyond_what_is_possible_does_not_widen_the_panel(runs, put):
    for seed, value in enumerate((0.1, 0.9)):
        put("fpn", seed, metrics={"AR100": value})
    (table,) = collate(load(runs))
    low, high = plots.draw(table).axes[0].get_xlim()
    assert -12 <= low < 10 and 90 < high <= 112


def test_what_stands_for_a_missing_value_hides_no_published_one(runs, put):
    put("c4")
    (table,) = collate(load(runs))
    figure = plots.draw(table)
    figure.canvas.draw()
    for panel in figure.axes:
        texts = [text.get_window_extent() for text in panel.texts]
        (published, *_) = (line for line in panel.lines if line.get_marker() == "D")
        marks = [panel.transData.transform(point) for point in published.get_xydata()]
        half = published.get_markersize() * figure.dpi / 72 / 2
        assert not [mark for mark in marks for box in texts if box.y0 - half < mark[1] < box.y1 + half]


@pytest.mark.parametrize("panels", [1, 2, 3, 5])
def test_the_legend_fits_the_figure(runs, put, panels):
    """As in a table of two metrics."""
    for row, seed in (("fpn", 0), ("fpn", 1), ("c4", 0)):
        put(row, seed)
    (table,) = collate(load(runs))
    metrics = table.definition.metrics[:panels]
    figure = plots.draw(replace(table, definition=table.definition.model_copy(update={"metrics": metrics})))
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1


def test_a_long_label_wraps_and_is_not_cut(runs, put):
    put("a row", table="own", verify={"label": "x"})
    (table,) = collate(load(runs))
    name = "image pyramid, trained at random scales drawn anew for each of the batches"
    long = replace(table, rows=tuple(replace(row, label=name) for row in table.rows))
    (label,) = plots.draw(long).axes[0].get_yticklabels()
    assert label.get_text().replace("\n", " ") == name and "\n" in label.get_text()

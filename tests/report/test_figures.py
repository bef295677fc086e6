"""The figures for papers: what they show is what the page's series hold, and equal tables give equal bytes."""

import json

import numpy as np
import pytest

from fpn_ablate.report.collate.collate import collate
from fpn_ablate.report.collate.records import load
from fpn_ablate.report.formats import figures, series

SIZES = {"edges": [8.0, 16.0, 32.0], "objects": [0, 5, 5, 2], "AR100": [None, 0.2, 0.4, 0.6]}


@pytest.fixture
def table(runs, put):
    for row, recall in (("c4", 0.45), ("fpn", 0.60), ("finest", 0.58)):
        for seed in range(2, 5):
            value = recall + 0.01 * seed
            folder = put(row, seed, metrics={"AR100": value, "AR1k": value + 0.1, "AR1k_s": value}, by_size=SIZES)
            lines = [{"step": step, "rpn_objectness": 1 / step, "rpn_box": 2 / step, "lr": 0.1} for step in range(1, 9)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (made,) = collate(load(runs))
    return made


def test_the_same_table_gives_the_same_bytes(table):
    first = figures.render(table)
    assert set(first) == {f"{name}.{kind}" for name in ("effects", "sizes", "curves", "cost") for kind in ("svg", "pdf")}
    assert figures.render(table) == first
    assert all(content.startswith((b"<?xml", b"%PDF")) for content in first.values())


def test_effects_show_differences_intervals_and_published_values(table):
    axis = figures.effects(table).axes[0]
    points = series.effects(table)
    drawn = [tuple(line.get_xdata()) for line in axis.lines]
    for point in points:
        assert (point["mean"],) in drawn and (point["low"], point["high"]) in drawn and (point["published"],) in drawn
    assert len(axis.get_yticks()) == len(points) > 3


@pytest.mark.parametrize(("draw", "x"), [(figures.sizes, "side"), (figures.curves, "step")])
def test_lines_are_the_series(table, draw, x):
    points = series.recall_by_size(table) if x == "side" else series.losses(table)
    for axis in draw(table).axes:
        for line in axis.get_legend_handles_labels()[0]:
            own = [p for p in points if p["label"] == line.get_label() and p.get("loss") in (None, axis.get_title())]
            np.testing.assert_array_equal(line.get_xdata(), [p[x] for p in own])
            np.testing.assert_array_equal(line.get_ydata(), [p["mean"] for p in own])
        assert len(axis.get_legend_handles_labels()[0]) == 3


def test_cost_is_drawn_against_the_first_metric(table):
    figure = figures.cost(table)
    shown = {(axis.get_xlabel(), *line.get_xydata()[0]) for axis in figure.axes for line in axis.get_legend_handles_labels()[0]}
    assert shown == {(p["kind"], p["cost"], p["mean"]) for p in series.costs(table)}


def test_every_figure_says_what_it_is_of_and_that_its_data_are_generated(table):
    for kind, content in figures.render(table).items():
        if kind.endswith("svg"):  # a PDF is the same figure, saved again
            assert content.count(b"<!-- GENERATED DATA -->") == 1
            assert content.count("<!-- table1_rpn · data shapes · recipe quick -->".encode()) == 1


def test_a_table_without_anything_to_show_has_no_figure(runs, put):
    put("c4", 0, status="failed", error="x")
    (made,) = collate(load(runs))
    assert figures.render(made) == {}

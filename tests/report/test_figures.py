"""The figures for papers: they are the page's charts, with all points, and equal tables give equal bytes."""

import json
import re
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from fpn_ablate.report.collate.collate import collate
from fpn_ablate.report.collate.records import load
from fpn_ablate.report.html import charts, figures, page

SIZES = {"edges": [8.0, 16.0, 32.0], "objects": [0, 5, 5, 2], "AR100": [None, 0.2, 0.4, 0.6]}


def make(put, *names, loss="rpn_box"):
    for row, recall in zip(names, (0.45, 0.60, 0.58), strict=True):
        for seed in range(2, 5):
            value = recall + 0.01 * seed
            folder = put(row, seed, metrics={"AR100": value, "AR1k": value + 0.1, "AR1k_s": value}, by_size=SIZES)
            lines = [{"step": step, "rpn_objectness": 1 / step, loss: 2 / step, "lr": 0.1} for step in range(1, 9)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def table(runs, put):
    make(put, "c4", "fpn", "finest")
    (made,) = collate(load(runs))
    return made


def test_every_figure_has_all_points_says_what_it_is_of_and_that_its_data_are_generated(table):
    made = figures.render(table)
    drawn = charts.charts(table, charts.row_colours([table])[table.name])
    points = {chart.key: chart.spec["data"]["values"] for chart in drawn}
    assert set(made) == {f"{name}.{kind}" for name in points for kind in ("svg", "pdf")}
    for name, values in points.items():
        svg = made[f"{name}.svg"].decode()
        published = sum(point.get("published") is not None for point in values)
        assert len(re.findall('aria-roledescription="point"', svg)) == len(values) + published > 2
        panels = {"curves": 2}.get(name, 1)  # of the losses
        assert svg.count(">GENERATED DATA<") == panels
        assert svg.count(">table1_rpn · data shapes · recipe quick<") == 1
        for row in {point["label"] for point in values if "row" in point}:
            assert f">{row}<" in svg, "a name in the legend"
        assert "var(--" not in svg and made[f"{name}.pdf"].startswith(b"%PDF")


def test_names_from_users_draw_nothing_else(runs, put):
    make(put, "__proto__", "</text><script> var(--ink)", "\\", loss="constructor")
    (table,) = collate(load(runs))
    for name, content in figures.render(table).items():
        if name.endswith("svg"):
            assert not [element for element in ElementTree.fromstring(content).iter() if "script" in element.tag]


def test_a_table_without_anything_to_show_has_no_figure(runs, put):
    put("c4", 0, status="failed", error="x")
    (made,) = collate(load(runs))
    assert figures.render(made) == {}


def test_too_little_address_space_costs_the_charts_and_not_the_process(table, monkeypatch, capsys):
    """V8 aborts where it cannot reserve its space; `ulimit -v` limits it."""
    monkeypatch.setattr(charts.resource, "getrlimit", lambda kind: (4 * 2**30, 4 * 2**30))
    monkeypatch.setitem(sys.modules, "vl_convert", None)  # an import of it fails
    assert figures.render(table) == {}
    reason = "the address space is limited to 4 GiB, and charts need 100; see ulimit -v"
    assert capsys.readouterr().err == f"{table.name}: no figures: {reason}\n"
    assert f"No charts: {reason}" in page.render([table])

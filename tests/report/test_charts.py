"""Charts: their figures are the table's, computed another way, and their specifications are valid."""

import re
from statistics import fmean

import numpy as np
import pytest
import vl_convert
from artifact_files import NAME, by_size, leave

from fpn_ablate.report.collate.collate import collate
from fpn_ablate.report.collate.records import load
from fpn_ablate.report.html import charts, gallery, page
from fpn_ablate.report.html.labels import HEIGHT, WIDTHS, place_labels
from fpn_ablate.report.html.vega import COLOURS, mean_axis, quantity, specification

VALUES = {"c4": 0.3, "fpn": 0.6, "bottom_up": 0.4, "no_lateral": 0.35}


@pytest.fixture
def table(put, runs):
    for row, value in VALUES.items():
        for seed in (2, 3, 4):
            metrics = {"AR100": value + 0.01 * seed, "AR1k": value + 0.02 * seed}
            leave(put(row, seed, by_size=by_size(value + seed / 100), pictures=NAME, metrics=metrics), value)
    return collate(load(runs))[0]


@pytest.fixture
def drawn(table):
    return {chart.key: chart for chart in charts.charts(table, charts.row_colours([table])[table.name])}


def points(chart):
    return chart.spec["data"]["values"]


def test_the_diagnosis_is_the_mean_over_seeds_in_percent(drawn):
    for key, axis, at, value in (
        ("errors", "error", "missed", 60.0),
        ("precision", "recall", 0, 60.0),
        ("iou", "iou", 0.5, 60.0),
    ):
        (point,) = [
            p
            for p in points(drawn[key])
            if p["label"] == "(c) FPN"
            and p[axis] == at
            and p.get("curve", "IoU .50") == "IoU .50"
            and p.get("objects", "all") == "all"
        ]
        assert (point["mean"], point["n"]) == (pytest.approx(value), 3)
    assert drawn["iou"].choices == ("all", "small", "medium", "large")
    assert not [p for p in points(drawn["iou"]) if p["objects"] == "large"], "undefined without objects"
    shares = {(p["object"], p["level"]): (p["share"], p["objects"]) for p in points(drawn["found"]) if p["label"] == "(c) FPN"}
    assert shares == {("under 1/16", "P2"): (100.0, 3), ("over 1/4", "P5"): (50.0, 3), ("over 1/4", "not found"): (50.0, 3)}


@pytest.mark.parametrize(
    ("name", "value", "missing"),
    [
        ("errors", np.zeros(5), "errors"),
        ("errors", np.full(6, 1e300), "errors"),
        ("error_counts", np.full(6, np.nan), "errors"),
        ("calibration", np.full((10, 3), np.inf), "errors"),
        ("precision", np.full((3, 101), "x"), "errors"),
        ("found_boxes", np.full((3, 4), np.nan, np.float32), "found"),
        ("found_levels", np.array([0, 9, -1]), "found"),
        ("found_levels", np.zeros((3, 2), int), "found"),
        ("found_names", np.arange(4), "found"),
    ],
)
def test_a_damaged_diagnosis_is_left_out(put, runs, name, value, missing):
    folder = put("fpn", 2, pictures=NAME)
    leave(folder, 0.5)
    with np.load(folder / "artifacts.npz") as content:
        arrays = {key: content[key] for key in content.files}
    np.savez_compressed(folder / "artifacts.npz", **arrays | {name: value})
    (table,) = collate(load(runs))
    made = [c.key for c in charts.charts(table, charts.row_colours([table])[table.name]) if not isinstance(c, str)]
    assert missing not in made and "curves" in made
    gallery.load_artifacts(table, gallery.Album())  # raises nothing either


def test_average_precision_by_class_and_calibration_are_of_rows_with_classes(put, runs):
    for row, shift in (("c4", 0.0), ("fpn", 0.2)):
        for seed in (2, 3):
            names = {f"class {k}": 0.1 + 0.01 * k + shift * k / 30 for k in range(30)}
            leave(put(row, seed, metrics={"AR100": 0.5, "AP": 0.4}, per_class=names), 0.5)
    (table,) = collate(load(runs))
    made = {c.key: c for c in charts.charts(table, charts.row_colours([table])[table.name]) if not isinstance(c, str)}
    shown = {p["class"] for p in points(made["classes"])}
    assert len(shown) == 24 and "class 29" in shown and "class 0" not in shown, "those on which rows differ most"
    fourth = [p for p in points(made["calibration"]) if p["label"] == "(c) FPN"][3]
    assert (fourth["scores"], fourth["count"], fourth["mean"]) == ("40–50 %", 8, 50.0)
    for chart in (made["classes"], made["calibration"]):
        assert vl_convert.vegalite_to_svg(chart.spec | {"width": 500})


def test_labels_of_rows_that_lie_close_do_not_overlap():
    close = [(10 + 0.1 * k, 50 + 0.2 * k, "a name") for k in range(6)]
    spread = [(1, 20, "first"), (30, 80, "last, of the rightmost row"), (15, 50.3, "(c)")]
    dots = [{"value": x, "mean": y, "low": y - 1, "high": None, "short": name} for x, y, name in (*close, *spread)]
    place_labels(dots)
    values, means = [dot["value"] for dot in dots], [end for dot in dots for end in (dot["mean"], dot["low"])]
    for n, (width, named) in enumerate(zip(WIDTHS, (8, 5), strict=True)):
        boxes = []
        for dot in (dot for dot in dots if dot["places"][n]):
            side, dx, dy = dot["places"][n]
            x = 16 + (dot["value"] - min(values)) / (max(values) - min(values)) * (width - 32) + dx
            y = HEIGHT - (dot["mean"] - min(means)) / (max(means) - min(means)) * HEIGHT + dy
            long = 5.9 * len(dot["short"])
            boxes.append((x - long * (side == "right"), x + long * (side == "left"), y - 6, y + 6))
        assert len(boxes) >= named
        for k, (left, right, top, bottom) in enumerate(boxes):
            assert not [b for b in boxes[:k] if left < b[1] and b[0] < right and top < b[3] and b[2] < bottom]


def test_recall_by_size_is_that_of_the_records(drawn, table):
    found = [p for p in points(drawn["recall"]) if p["label"] == "(c) FPN"]
    assert len(found) == 10, "a bin without objects has no point"
    records = next(row for row in table.rows if row.row == "fpn").records
    for number, point in enumerate(found, start=1):
        values = [100 * record["by_size.AR100"][number] for record in records]
        assert point["mean"] == pytest.approx(fmean(values), abs=0.006)
        assert (point["low"], point["high"]) == pytest.approx((min(values), max(values)), abs=0.006)
        assert (point["n"], point["objects"]) == (3, number)
    assert found[0]["size"] == "4–6 px" and found[-1]["size"] == "over 91 px"
    assert drawn["recall"].spec["layer"][0]["data"]["values"] == [{"side": 16.0}, {"side": 48.0}]


def test_learning_curves_are_the_lines_of_the_runs(drawn, table):
    chart = drawn["curves"]
    assert chart.choices == ("rpn_class",), "neither the rate nor a metric is a loss"
    first = next(p for p in points(chart) if p["label"] == "(c) FPN")
    assert (first["step"], first["mean"], first["n"]) == (20, pytest.approx(1 / 20 + VALUES["fpn"], abs=1e-4), 3)
    assert {p["step"] for p in points(chart)} == set(range(20, 501, 20))


def test_effects_are_those_of_the_verdicts(drawn, table):
    found = points(drawn["effects"])
    judged = [verdict for verdict in table.verdicts if verdict.contrast]
    assert len(found) == len(judged) > 3
    cells = {row.row: row.cells for row in table.rows}
    for point, verdict in zip(found, judged, strict=True):
        claim = verdict.claim
        rows = [[cells[name][claim.metric].ours.mean for name in side] for side in (claim.plus, claim.minus)]
        if claim.less is None:
            assert point["mean"] == pytest.approx(fmean(rows[0]) - fmean(rows[1]), abs=0.006)
        assert (point["low"], point["high"]) == pytest.approx(
            (verdict.contrast.ours.low, verdict.contrast.ours.high), abs=0.006
        )
        assert point["verdict"] == verdict.verdict
    published = next(p for p in found if p["contrast"] == "(c) − (a)" and p["metric"] == "AR@1k")["published"]
    assert published == pytest.approx(56.3 - 48.3)


def test_costs_are_those_of_the_records(drawn, table):
    found = {(p["label"], p["cost"]): p for p in points(drawn["costs"])}
    assert found["(c) FPN", "GFLOPs"]["value"] == 1.5
    assert found["(c) FPN", "GFLOPs"]["mean"] == pytest.approx(63.0, abs=1e-3)
    assert drawn["costs"].choices == ("GFLOPs",), "a cost that no record has is no choice"


def test_learned_weights_are_the_mean_over_seeds_and_no_chart_without_any(put, runs, drawn):
    assert "fusion" not in drawn
    for seed, share in ((2, 0.5), (3, 0.7)):
        put("fpn", seed, fusion=[["layers.0.down.p2", [share, 1 - share]]])
    table = collate(load(runs))[0]
    chart = {c.key: c for c in charts.charts(table, charts.row_colours([table])[table.name]) if not isinstance(c, str)}[
        "fusion"
    ]
    assert [(p["sum"], p["input"], p["share"]) for p in points(chart)] == [
        ("layers.0.down.p2", 1, 60.0),
        ("layers.0.down.p2", 2, 40.0),
    ]
    assert vl_convert.vegalite_to_svg(chart.spec)


@pytest.mark.parametrize(
    "damaged", [[1], [["a", [0.5, "x"]]], [["other", [1.0]]], [["layers.0.down.p2", [1.0]]], "text", [[["a"], [1.0]]]]
)
def test_learned_weights_that_are_none_are_left_out(put, runs, damaged):
    put("fpn", 2, fusion=[["layers.0.down.p2", [0.5, 0.5]]])
    put("fpn", 3, fusion=damaged)
    table = collate(load(runs))[0]
    assert [p["share"] for p in points(charts.fusion(table, charts.row_colours([table])[table.name]))] == [50.0, 50.0]


def test_one_seed_has_no_interval(put, runs):
    put("c4", 2)
    put("fpn", 2)
    table = collate(load(runs))[0]
    chart = charts.effects(table)
    assert {p["low"] for p in points(chart)} == {None}
    assert "rule" not in {layer["mark"]["type"] for layer in chart.spec["layer"]}


@pytest.mark.parametrize(("value", "label"), [(0.548, "0.548"), (12.25, "12.25"), (5e-5, "0.00005"), (0.0, "0")])
def test_an_axis_with_one_value_names_it(value, label):
    encoding = {"x": quantity("mean", "x", scale={"zero": False}), "y": mean_axis("y")}
    svg = vl_convert.vegalite_to_svg(specification([{"mean": value}], [{"mark": "point"}], encoding) | {"width": 500})
    assert re.findall(r"<text[^>]*>([^<]*)<", svg) == [label, "x", label, "y"]


def test_specifications_compile_without_a_warning_and_have_the_pages_colours(drawn, capfd):
    assert list(drawn) == ["recall", "effects", "costs", "curves", "errors", "precision", "iou", "found"]
    for chart in drawn.values():
        svg = vl_convert.vegalite_to_svg(chart.spec | {"width": 500}, show_warnings=True)
        assert ("var(--l0)" if chart.key == "found" else "var(--c0)") in svg
    assert "WARN" not in capfd.readouterr().err


def test_a_row_keeps_its_colour_in_every_table(put, runs):
    for row in ("c4", "c5", "fpn"):
        put(row, 2)
    for row in ("own", "fpn"):
        put(row, 2, table="own")
    tables = collate(load(runs))
    found = charts.row_colours(tables)
    first, second = (found[table.name] for table in tables)
    assert first["fpn"] == second["fpn"]
    assert len(set(first.values())) == len(first) == 2
    assert len(set(second.values())) == len(second) == 6


def test_rows_share_a_colour_only_where_there_are_too_few_and_then_not_with_runs(put, runs):
    """Twenty rows, of which four have no run; ten rows; and rows that met their colour in different tables."""
    for number in range(14):
        put(f"row {number}", 2, recipe="a")
    for number in range(4):
        put(f"row {number}", 2, recipe="b")
        put(f"row {number}", 2, table="own", recipe="c")
    for row in ("fpn", "finest"):
        put(row, 2, recipe="a")
        put(row, 2, table="own", recipe="d")
    put("row 0", 2, table="own", recipe="d")
    tables = {table.recipe: table for table in collate(load(runs))}
    found = {recipe: charts.row_colours(tables.values())[table.name] for recipe, table in tables.items()}
    assert {recipe: (len(colours), len(set(colours.values()))) for recipe, colours in found.items()} == {
        **{"a": (20, 16), "b": (10, 10), "c": (4, 4), "d": (3, 3)}
    }
    assert len({found["a"][row.row] for row in tables["a"].rows if row.states}) == COLOURS
    text = page.source("page.css")
    assert all(f"--c{number}: light-dark(" in text for number in range(COLOURS)) and f"--c{COLOURS}:" not in text


def test_more_rows_than_colours_are_drawn_all_the_same(put, runs):
    for number in range(19):
        put(f"row {number}", 2, table="own")
    table = collate(load(runs))[0]
    colours = charts.row_colours([table])[table.name]
    assert len(colours) == len({p["row"] for p in points(charts.costs(table, colours))}) == 19


def test_lines_of_metrics_that_are_no_numbers_are_left_out(put, runs):
    """Text, lists and integers that no float holds, as a step and as a value."""
    folder = put("fpn", 2)
    lines = ['{"step": 1, "loss": 0.5}', '{"step": [1], "loss": 1}', '{"step": "x", "loss": 1}', '{"step": null, "loss": 1}']
    lines += ['{"step": 2, "loss": 1%s}' % ("0" * 400), '{"step": 1%s, "loss": 1}' % ("0" * 400), "[]", "3"]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (table,) = collate(load(runs))
    chart = charts.curves(table, charts.row_colours([table])[table.name])
    assert [(point["step"], point["mean"]) for point in points(chart)] == [(1, 0.5)]


@pytest.mark.parametrize(
    "broken",
    [
        {"edges": [1, 2]},
        {"AR100": None},
        {"edges": []},
        {"objects": [1]},
        {"edges": [0.0] * 10},
        {"AR100": [1e10] * 11},
        {"edges": ["4"]},
    ],
)
def test_a_record_whose_bins_do_not_fit_is_left_out(put, runs, broken):
    put("c4", 2, by_size=by_size() | broken)
    table = collate(load(runs))[0]
    assert isinstance(charts.recall(table, {}), str)

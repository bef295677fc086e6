"""Tables made of records: which rows, means and intervals, what is refused, what the footer says."""

import math

import numpy as np
import pytest
import yaml
from settings import ROWS

from fpn_ablate.config.sources import SOURCES
from fpn_ablate.report.collate.collate import collate
from fpn_ablate.report.collate.records import load, write_ledger
from fpn_ablate.report.collate.table import file_name
from fpn_ablate.store.bootstrap_store import save
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.paths import EXPERIMENTS, RESAMPLED

pytestmark = pytest.mark.usefixtures("three_seeds")


def only_table(runs):
    (table,) = collate(load(runs))
    return table


def row_of(table, name):
    (row,) = [row for row in table.rows if row.row == name]
    return row


def footer_of(table, label):
    return [text for found, text in table.footer if found == label]


def test_mean_and_deviation_are_numpys(runs, put):
    values = [0.41, 0.44, 0.39, 0.47]
    for seed, value in enumerate(values):
        put(seed=seed, metrics={"AR100": value})
    cell = row_of(only_table(runs), "fpn").cells["AR100"]
    assert math.isclose(cell.ours.mean, 100 * np.mean(values))
    assert math.isclose(cell.ours.std, 100 * np.std(values, ddof=1))
    assert math.isclose(cell.difference, 100 * np.mean(values) - 44.0)
    assert cell.ours.n == 4


def test_states(runs, put):
    put("c4", 0)
    put("c4", 1, status="failed", error="out of memory")
    put("c5", 0, status="diverged")
    put("fpn", 0, status="failed")
    put("fpn", 1, status="interrupted")
    table = only_table(runs)
    assert [row_of(table, name).state for name in ROWS[:4]] == ["finished", "diverged", "failed", "not run"]
    assert row_of(table, "c4").seeds == (0,)
    assert row_of(table, "c4").cells["AR100"].ours.n == 1
    assert row_of(table, "c4").errors == {1: "out of memory"}


def test_metrics_of_an_unfinished_seed_do_not_count(runs, put):
    put(seed=0, metrics={"AR100": 0.5})
    folder = put(seed=1, metrics={"AR100": 0.1})
    file = folder / "record.json"
    file.write_text(file.read_text().replace('"status": "finished"', '"status": "interrupted"'))
    assert row_of(only_table(runs), "fpn").cells["AR100"].ours.mean == 50


def test_newest_finished_setting_is_shown_whatever_failed_later(runs, put):
    put(setting="a", fingerprint="1", finished="2026-01-02T00:00:00+01:00", metrics={"AR100": 0.2})
    put(setting="b", fingerprint="2", finished="2026-01-01T23:30:00Z", metrics={"AR100": 0.3})
    put(setting="c", fingerprint="3", finished="2026-02-01T00:00:00Z", status="failed")
    table = only_table(runs)
    assert table.setting == "b"
    assert len(footer_of(table, "left out")) == 2


def test_the_users_parts_are_named_by_row(runs, put):
    put("pan", 0, user_parts={"neck": {"class": "necks.PathAggregation", "content": "1"}})
    put("pan", 1, user_parts={"neck": {"class": "necks.PathAggregation", "content": "1"}})
    put(
        "wide",
        0,
        user_parts={"rpn.head": {"class": "heads.Wide", "content": "2"}, "backbone": {"class": "b.C", "content": "3"}},
    )
    put("fpn", 0)
    (text,) = footer_of(only_table(runs), "user's parts")
    assert text == ("pan: the user's neck necks.PathAggregation; wide: the user's backbone b.C, the user's RPN head heads.Wide")


def test_tables_are_apart_by_table_recipe_and_data(runs, put):
    put(fingerprint="1")
    put(fingerprint="2", data="faces", generated=False)
    put(fingerprint="3", recipe="gpu")
    put(fingerprint="4", table="other")
    tables = collate(load(runs))
    assert len({table.key for table in tables}) == 4
    assert [table.generated for table in tables if table.data == "faces"] == [False]
    assert [table.key for table in collate(load(runs), only={("other", "quick", "shapes")})] == [("other", "quick", "shapes")]


def test_sources_of_proposals_are_no_table_but_stay_in_the_ledger(runs, put, tmp_path):
    put()
    put("fpn", 1, table=SOURCES)
    assert only_table(runs).name == "table1_rpn-shapes-quick"
    write_ledger(load(runs), tmp_path / "ledger.csv")
    assert load(tmp_path / "ledger.csv")["table"].tolist() == [SOURCES, "table1_rpn"]


def test_own_rows_stand_below_without_published_values(runs, put):
    put("a_row_of_mine")
    table = only_table(runs)
    assert [row.row for row in table.rows] == [*ROWS, "a_row_of_mine"]
    assert row_of(table, "a_row_of_mine").published == {}


def test_table_without_a_definition_shows_what_it_finds(runs, put):
    put("b", table="unheard_of", metrics={"AP": 0.3, "AP_s": None})
    put("b", table="another", metrics={"AQ": 0.3})
    (table,) = collate(load(runs), only={("unheard_of", "quick", "shapes")})
    assert [metric.key for metric in table.definition.metrics] == [
        "AP", "AP_s", "AR100", "AR1k", "AR1k_s", "AR1k_m", "AR1k_l",
    ]  # fmt: skip
    assert [row.row for row in table.rows] == ["b"] and not table.published


def test_a_column_may_read_another_metric_of_records_that_have_it(runs, put, tmp_path):
    """RPNs and detectors in one table: AR1k of the ones, proposal_AR1k of the others, with its replicates."""
    metrics = [{"key": "AR1k", "instead": "proposal_AR1k"}]
    report = {"title": "t", "facts": [], "metrics": metrics, "rows": [{"row": "a"}, {"row": "b"}]}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"table": "mine", "report": report}))
    draws = np.linspace(0.2, 0.3, 20)
    for row, values in (("a", {"AR1k": 0.4}), ("b", {"AR1k": 0.4, "proposal_AR1k": 0.5})):
        folder = put(row, table="mine", metrics=values)
        save(folder / RESAMPLED, {name: draws + value for name, value in values.items()})
    (table,) = collate(load(runs), experiments=[tmp_path])
    cells = [row_of(table, row).cells["AR1k"] for row in "ab"]
    assert [cell.values for cell in cells] == [{0: pytest.approx(40)}, {0: pytest.approx(50)}]
    assert cells[1].resampled[0].mean() - cells[0].resampled[0].mean() == pytest.approx(10, abs=0.01)


def test_a_later_folder_defines_a_table_anew(runs, put, tmp_path):
    mine = {"table": "table1_rpn", "report": {"title": "Mine", "facts": [], "metrics": [{"key": "AR100"}]}}
    (tmp_path / "other_name.yaml").write_text(yaml.safe_dump(mine))
    put()
    (table,) = collate(load(runs), experiments=[EXPERIMENTS, tmp_path])
    assert table.definition.title == "Mine"
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(mine))
    with pytest.raises(UserError, match="defined twice"):
        collate(load(runs), experiments=[EXPERIMENTS, tmp_path])


def test_same_data_as_the_paper_only_on_all_of_it(runs, put):
    cases = {"coco": 5000, "COCO2017": 5000, "facemask": 5000, "coco-minival": 4952}
    for data, count in cases.items():
        put(fingerprint=data, data=data, generated=False, images={"count": count, "digest": "d"})
    put(fingerprint="g", data="minival", generated=True, images={"count": 5000, "digest": "d"})
    same = {table.data: table.same_data for table in collate(load(runs))}
    assert same == {"coco": True, "COCO2017": True, "facemask": False, "coco-minival": False, "minival": False}


def test_missing_seeds_of_the_definition_are_in_the_footer(runs, put):
    put(seed=1)
    put("c4", seed=3, status="failed", error="no")  # it was run
    assert footer_of(only_table(runs), "seeds") == ["1; planned and not run: 2, 4"]


def test_unreadable_records_are_in_the_footer(runs, put):
    put("c4")
    (put("fpn", folder="seed0-half") / "record.json").write_text('{"format"')
    (text,) = footer_of(only_table(runs), "unreadable")
    assert text.startswith("1 of the record files") and "seed0-half/record.json" in text


def test_circumstances_that_differ_are_all_shown(runs, put):
    put("fpn", 0, images={"count": 400, "digest": "aaaa"})
    put("fpn", 1, images={"count": 399, "digest": "bbbb"})
    (text,) = footer_of(only_table(runs), "images")
    assert text == "399 evaluated, list bbbb (1 of 2 runs); 400 evaluated, list aaaa (1 of 2 runs)"


def test_file_names_are_harmless_short_and_apart():
    hostile = [("../../etc", "q", "d"), ("a/b", "q", "d"), ("a_b", "q", "d"), ("a b", "q", "d"), ("x" * 300, "q", "d")]
    hostile += [("x" * 301, "q", "d"), ("..", "", ""), ("t", "q", "日本"), ("t", "q", "日木"), ("t", "q", "a\nb")]
    names = [file_name(key) for key in hostile]
    assert len(set(names)) == len(names)
    assert all(len(name) <= 100 and "/" not in name and not name.startswith(".") for name in names)
    assert file_name(("table1_rpn", "quick", "shapes")) == "table1_rpn-shapes-quick"


def test_ambiguous_file_names_are_refused_and_the_others_are_made(runs, put):
    put(table="a-b", data="c", fingerprint="1")
    put(table="a", data="b-c", fingerprint="2")
    put()
    with pytest.raises(UserError, match="a-b-c-quick"):
        collate(load(runs))
    errors = []
    assert [table.key for table in collate(load(runs), errors=errors)] == [("table1_rpn", "quick", "shapes")]
    assert len(errors) == 2 and all("a-b-c-quick" in error for error in errors)


def test_the_backbone_is_in_the_footer(runs, put):
    def backbone(weights):
        return {"backbone": {"name": "small", "weights": weights, "freeze_at": 2}}

    put("c4", config=backbone("pretrain"), cost={"pretrain_accuracy": 0.9712})
    put("c4", data="b", fingerprint="b", config=backbone("imagenet"), cost={"pretrain_accuracy": None})
    put("c4", data="c", fingerprint="c", config=backbone("mine.pt"))
    put("c4", data="d", fingerprint="d", config=backbone("none"))
    put("c4", data="e", fingerprint="e", status="failed", config=backbone("pretrain"), cost={})
    put("c4", data="f", fingerprint="f", config=backbone("shipped"), cost={"pretrain_accuracy": 0.9212})
    assert {table.data: footer_of(table, "backbone") for table in collate(load(runs))} == {
        "shapes": ["small, pre-trained on generated pictures, 97 % of held-out ones right, freeze_at 2"],
        "b": ["small, weights from ImageNet (torchvision), freeze_at 2"],
        "c": ["small, weights from the file mine.pt, freeze_at 2"],
        "d": ["small, random weights, freeze_at 2"],
        "e": ["small, pre-trained on generated pictures, freeze_at 2"],
        "f": ["small, the package's weights, pre-trained on generated pictures, 92 % of held-out ones right, freeze_at 2"],
    }


def test_each_pre_training_counts_once_in_the_footer(runs, put):
    """Backbones are told apart by their weights: all of timm's have one name."""
    for seed, model, seconds in ((0, "a", 3600), (1, "a", 0), (0, "b", 1800)):
        changes = {"config": {"backbone": {"name": "timm", "model": model}}, "cost": {"train_s": 60.0, "pretrain_s": seconds}}
        put(f"row_{model}", seed=seed, weights=f"digest of {model}", **changes)
    (table,) = collate(load(runs))
    assert footer_of(table, "cost")[0].endswith("; pre-training 1.5 h, shared")


def test_the_precision_is_in_the_footer(runs, put):
    for data, bf16 in (("a", {}), ("b", {"bf16": False}), ("c", {"bf16": True})):
        put(data=data, fingerprint=data, environment={"device": "cpu (X)", "threads": 1}, **bf16)
    assert {table.data: footer_of(table, "device") for table in collate(load(runs))} == {
        "a": ["cpu (X), 1 thread a run"],
        "b": ["cpu (X), 1 thread a run"],
        "c": ["cpu (X), 1 thread a run, convolutions in bf16"],
    }


def test_repairs_are_in_the_footer_where_there_are_any(runs, put):
    put(data="a", fingerprint="a", repairs={"train": {"boxes clipped": 3, "degenerate boxes": 1}, "val": {"boxes clipped": 2}})
    put(data="c", fingerprint="c", repairs={"train": {}, "val": {}})
    put(data="d", fingerprint="d")
    assert [footer_of(table, "repairs") for table in collate(load(runs))] == [
        ["train: boxes clipped 3, degenerate boxes 1; val: boxes clipped 2"],
        [],
        [],
    ]


def test_a_fact_may_stand_under_several_keys(runs, put, tmp_path):
    (tmp_path / "own").mkdir()
    parts = '{key: cost, from: "verify.gflops + verify.anchors"}'
    text = f"table: table1_rpn\nreport:\n  title: T\n  facts: [{parts}]\n  metrics: [{{key: AR100}}]\n"
    (tmp_path / "own" / "t.yaml").write_text(text)
    put("c4", 0)
    put("fpn", 0, verify={"gflops": 1.25})
    (table,) = collate(load(runs), experiments=[tmp_path / "own"])
    assert {row.row: row.facts["cost"] for row in table.rows} == {"c4": "1.5 + 47250", "fpn": None}

"""What a cell says of a run that may not stand in a mean."""

import csv
import io

import pytest

from fpn_ablate.report.collate import health
from fpn_ablate.report.collate.collate import collate
from fpn_ablate.report.collate.records import load
from fpn_ablate.report.formats import tables
from fpn_ablate.report.formats.grid import grid
from fpn_ablate.report.html import page


@pytest.mark.parametrize(
    ("status", "error", "recall", "word"),
    [
        ("finished", None, 0.5, "finished"),
        ("finished", None, None, "finished"),  # not evaluated for recall
        ("finished", None, 0.009, "unhealthy"),
        ("diverged", "diverged at step 120: objectness is nan", None, "diverged @ step 120"),
        ("diverged", "of its own", None, "diverged"),
        ("failed", "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", None, "out of memory"),
        ("failed", "RuntimeError: DefaultCPUAllocator: can't allocate memory", None, "out of memory"),
        ("failed", "KeyError: 'x'", None, "failed"),
        ("interrupted", None, None, "interrupted"),
        ("running", None, None, "killed or running"),  # of a ledger
    ],
)
def test_one_word_for_each_fate(status, error, recall, word):
    assert health.state({"status": status, "error": error, "metrics.AR100": recall}) == word


@pytest.mark.parametrize(("live", "word"), [(True, "running"), (False, "killed")])
def test_a_run_whose_lock_is_held_is_running(live, word):
    assert health.state({"status": "running", "live": live}) == word


def test_an_evaluated_detector_that_finds_nothing_has_its_figures(runs, put):
    """A number is all that is asked there."""
    put("c4", config={"mode": "evaluate"}, metrics={"AR100": 0.0031, "AR1k": None})
    (table,) = collate(load(runs))
    line = next(line for line in grid(table).lines if line.row and line.row.row == "c4")
    assert line.metrics[:2] == ("0.3", "n/a") and line.label.endswith(", unhealthy [1]")
    assert dict(table.footer)["seeds"].startswith("none healthy")


def test_an_unhealthy_seed_is_shown_and_not_averaged(runs, put):
    put(seed=0, metrics={"AR100": 0.5})
    put(seed=1, metrics={"AR100": 0.002})
    put("c4", 0, metrics={"AR100": 0.001})
    (table,) = collate(load(runs))
    fpn, c4 = (next(row for row in table.rows if row.row == name) for name in ("fpn", "c4"))
    assert fpn.cells["AR100"].ours.mean == pytest.approx(50) and fpn.states == {0: "finished", 1: "unhealthy"}
    assert c4.state == "unhealthy"
    made = grid(table)
    line = next(line for line in made.lines if line.label.startswith("(a)"))
    assert line.label == "(a) baseline on conv4, unhealthy [1]" and line.metrics[0] == "0.1" and line.facts[-1] == "1"
    assert "c4, seed 0: unhealthy (AR@100 0.10 %, less than 1 %); its figures enter no comparison" in made.notes
    for text in (tables.markdown(table), tables.latex(table), page.render([table])):
        assert "baseline on conv4, unhealthy" in text
    lines = csv.DictReader(io.StringIO(tables.csv_text(table)))
    assert [(line["mean"], line["state"]) for line in lines if (line["row"], line["metric"]) == ("c4", "AR100")] == [
        ("0.1", "unhealthy")
    ]
    assert {v.verdict for v in table.verdicts if "c4" in v.claim.minus} == {"no result"} and not table.effects
    assert "as their rows are not run or not healthy" in page.render([table])
    assert any("the cells are over 1 of 2 seeds" in note for note in made.notes)


def test_an_unfair_table_is_made_on_request_alone_and_names_the_keys(runs, put):
    older = {"setting": "01d0" * 4, "config": {"recipe": {"steps": 400}}, "finished": "2025-01-01T00:00:00+00:00"}
    for seed in range(3):
        put("fpn", seed, metrics={"AR100": 0.5 + 0.001 * seed})
        put("c4", seed, metrics={"AR100": 0.4 + 0.001 * seed}, **older)
    (fair,) = collate(load(runs))
    (unfair,) = collate(load(runs), allow_unfair=True)
    states = [{row.row: row.state for row in table.rows} for table in (fair, unfair)]
    assert states[0]["c4"] == "not run" and states[1]["c4"] == "finished"
    assert fair.verdicts and not unfair.verdicts and not unfair.best
    assert unfair.name == f"{fair.name}-unfair" and fair.warning == "GENERATED DATA: not comparable with COCO"
    for text in (tables.markdown(unfair), tables.latex(unfair), tables.csv_text(unfair)):
        assert "UNFAIR: rows differ in more than the declared factors" in text
    assert ("left out", "3 records of another setting: recipe.steps 400, here 500") in fair.footer
    assert ("UNFAIR", "3 records of another setting: recipe.steps 400, here 500") in unfair.footer


def test_figures_of_two_evaluators_do_not_stand_side_by_side(runs, put):
    put("fpn")
    put("c4", environment={"evaluator": "pycocotools 2.0.10"}, finished="2025-01-01T00:00:00+00:00")
    (table,) = collate(load(runs))
    assert {row.row: row.state for row in table.rows}["c4"] == "not run"
    assert "environment.evaluator pycocotools 2.0.10" in dict(table.footer)["left out"]


def test_the_cost_says_which_runs_count_from_an_interruption_on(runs, put):
    for seed in range(3):
        put(seed=seed, cost={"train_s": 60.0, "eval_s": 6.0, "resumed_at": 100 * (seed == 1)})
    (table,) = collate(load(runs))
    assert "(1 went on after an interruption, and counts from there)" in dict(table.footer)["cost"]

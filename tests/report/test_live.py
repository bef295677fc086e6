"""How far the page says a sweep is, and the process that writes it."""

import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta

import pytest
from planned_sweep import planned_sweep

from fpn_ablate.report.collate.collate import collate
from fpn_ablate.report.collate.records import load
from fpn_ablate.report.html import progress as reporting
from fpn_ablate.report.html.progress import progress
from fpn_ablate.store import plan, record
from fpn_ablate.utils.locks import lock

CELLS = [plan.PlannedRun("table1_rpn", "quick", "shapes", row, seed, 500) for row in ("c4", "fpn") for seed in (2, 3)]
NOW = "2027-01-01T00:00:00+00:00"


def shown(runs):
    frame = load(runs)
    found = progress(plan.active_plans(runs), runs, frame.to_dict("records"), collate(frame))
    return found, {(row, seed): state for row, states in found.boards[0].rows
                   for seed, state in zip(found.boards[0].seeds, states, strict=True)}  # fmt: skip


def test_every_cell_is_finished_running_waiting_or_failed(put, runs):
    put("c4", 2, metrics={"AR100": 0.123}, code="present")
    put("c4", 3, status="diverged", error="loss is not finite at step 120", finished=NOW)
    plan.write_plan(runs, CELLS, "present")
    folder = runs / "table1_rpn" / "quick" / "fpn" / "seed2-01234567"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("")
    os.utime(folder / "config.yaml", (time.time(), time.time()))
    (folder / "metrics.jsonl").write_text('{"step": 20, "a": 1}\n{"step": 100, "a": 1}\n{"step": 1')
    os.utime(folder / "metrics.jsonl", (time.time() + 60, time.time() + 60))
    found, states = shown(runs)
    assert states["baseline on conv4", 2].text == "AR@100 12.3"
    failed = states["baseline on conv4", 3]
    assert (failed.kind, failed.text, failed.detail) == ("failed", "diverged @ step 120", "loss is not finite at step 120")
    assert states["FPN", 2].text == "step 100 of 500, 4 min left" and states["FPN", 2].share == 0.2
    assert states["FPN", 3].kind == "waiting"
    assert found.count() == 4 and [found.count(kind) for kind in reporting.MARKS] == [1, 1, 1, 1]


def begin(runs, row, step, seconds, recipe="quick", seed=2):
    """Leave the folder of a run that has come to this step in these seconds."""
    folder = runs / "table1_rpn" / recipe / row / f"seed{seed}-01234567"
    folder.mkdir(parents=True)
    now = time.time()
    for name, text, at in (("config.yaml", "", now), ("metrics.jsonl", f'{{"step": {step}, "a": 1}}\n', now + seconds)):
        (folder / name).write_text(text)
        os.utime(folder / name, (at, at))


@pytest.mark.parametrize(
    ("slow", "left"),
    [
        ([("fpn", 100, 60)], "4 min"),  # of 500 steps
        ([("fpn", 100, 60), ("c4", 1, 1)], "8 min"),
        ([("fpn", 0, 1)], ""),  # not known, so nothing is promised
        ([], ""),
    ],
)
def test_the_time_left_is_that_of_all_sweeps_and_never_less_than_that_of_a_row(put, runs, slow, left):
    """A sweep whose first run took 5 seconds of its two, and beside it one with none finished."""
    began = datetime.now(UTC).replace(microsecond=0)
    put("c4", 2, recipe="fast", finished=(began + timedelta(seconds=5)).isoformat())
    fast = [plan.PlannedRun("table1_rpn", "fast", "shapes", row, 2, 500) for row in ("c4", "fpn")]
    other = [plan.PlannedRun("table1_rpn", "quick", "shapes", row, 2, 500) for row, *_ in slow or [("fpn",)]]
    for run in slow:
        begin(runs, *run)
    plans = [plan.Plan(began.isoformat(), "", "", tuple(cells)) for cells in (fast, other)]
    assert progress(plans, runs, load(runs).to_dict("records"), []).time_left == left
    assert progress(plans[:1], runs, load(runs).to_dict("records"), []).time_left == "5 s"
    begin(runs, "fpn", 400, 168, "fast")
    assert progress(plans[:1], runs, load(runs).to_dict("records"), []).time_left == "42 s", "as its row says"


def test_runs_in_progress_have_curves_of_losses_rate_and_pace(runs):
    plan.write_plan(runs, CELLS)
    folder = runs / "table1_rpn" / "quick" / "fpn" / "seed2-01234567"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("")
    assert shown(runs)[0].curves is None, "before the first line"
    lines = [{"step": step, "rpn_objectness": 0.1, "rpn_box": 1 / step, "lr": 0.1} for step in (20, 40)]
    lines.append({"step": 40, "AR100": 0.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 6')
    (folder / "throughput.jsonl").write_text('{"step": 40, "images_per_s": 7.0}\n{"step": 40, "images_per_s": 8.5}\n')
    chart = shown(runs)[0].curves
    assert chart.choices == ("rpn_objectness", "rpn_box", "AR100", "learning rate", "images per second")
    assert chart.spec["params"][1] == {"name": "choice", "value": "rpn_objectness"}, "a loss, not what comes first by its name"
    values = [(p["label"], p["curve"], p["step"], p["mean"]) for p in chart.spec["data"]["values"]]
    assert ("fpn, seed 2", "rpn_box", 40, 0.025) in values and ("fpn, seed 2", "learning rate", 20, 0.1) in values
    assert [value for value in values if value[1] == "images per second"] == [("fpn, seed 2", "images per second", 40, 8.5)]


def test_runs_of_equal_rows_and_seeds_are_named_by_what_differs(runs):
    cells = [plan.PlannedRun("table1_rpn", recipe, "shapes", "fpn", 2, 500) for recipe in ("quick", "smoke")]
    plan.write_plan(runs, [*cells, plan.PlannedRun("table1_rpn", "smoke", "shapes", "c4", 2, 500)])
    for recipe, row in (("quick", "fpn"), ("smoke", "fpn"), ("smoke", "c4")):
        begin(runs, row, 20, 9, recipe)
    names = {point["label"] for point in shown(runs)[0].curves.spec["data"]["values"]}
    assert names == {"fpn, seed 2, quick", "fpn, seed 2, smoke", "c4, seed 2"}


def test_a_pre_training_in_progress_is_named(runs):
    plan.write_plan(runs, CELLS)
    folder = runs.parent / "backbones"
    folder.mkdir()
    (folder / "done-0123.pt.lock").touch()
    with lock(folder / "small-0123.pt.lock"):
        (note,) = shown(runs)[0].notes
        assert note.startswith("pre-training the backbone small, on which runs wait; last saved 0 s ago")
        (folder / "small-0123.pt").touch()
        assert shown(runs)[0].notes == ()


@pytest.mark.parametrize("step", ["1" + "0" * 400, "Infinity", '"x"', "[1]", "null"])
def test_a_step_that_is_no_number_is_a_run_that_begins(runs, put, step):
    put("c4", 2)
    plan.write_plan(runs, CELLS)
    folder = runs / "table1_rpn" / "quick" / "fpn" / "seed2-01234567"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("")
    (folder / "metrics.jsonl").write_text(f'{{"step": {step}}}\n')
    assert shown(runs)[1]["FPN", 2].text == "starting"


def test_what_a_plan_says_is_shown_without_control_characters_and_folders(runs, put, monkeypatch):
    put("c4", 2)
    monkeypatch.setenv(plan.COMMAND, "run data.root=/home/me/set \x1b[2J")
    plan.write_plan(runs, [plan.PlannedRun("t\x1b", "quick", "shapes", "r\x07", 2, 5)])
    found = progress(plan.active_plans(runs), runs, [], [])
    assert found.commands == ("run data.root=…/set �[2J",)
    assert (found.boards[0].title, found.boards[0].rows[0][0]) == ("t� · data shapes · recipe quick", "r�")


def test_what_older_code_has_finished_is_waiting_now(put, runs):
    put("c4", 2, code="older")
    plan.write_plan(runs, CELLS, "present")
    assert shown(runs)[1]["baseline on conv4", 2].kind == "waiting"


def test_a_failure_of_an_earlier_sweep_is_waiting_now(put, runs):
    put("c4", 2, status="failed", error="ValueError: no")
    plan.write_plan(runs, CELLS)
    assert shown(runs)[1]["baseline on conv4", 2].kind == "waiting"


def test_a_run_that_went_on_is_timed_from_there(put, runs):
    put("c4", 3)
    plan.write_plan(runs, CELLS)
    begin(runs, "fpn", 400, 60)
    folder = runs / "table1_rpn" / "quick" / "fpn" / "seed2-01234567"
    record.write(folder, {"status": "running", "cost": {"resumed_at": 300}})
    assert shown(runs)[1]["FPN", 2].text == "step 400 of 500, 60 s left"
    record.write(folder, {"status": "running", "cost": {"resumed_at": "x"}})
    assert shown(runs)[1]["FPN", 2].text == "step 400 of 500, 15 s left"


def test_a_finished_run_is_shown_beside_a_killed_one_of_other_code(put, runs):
    plan.write_plan(runs, CELLS)
    ended = datetime.now(UTC) + timedelta(seconds=5)
    put("c4", 2, finished=ended.isoformat(timespec="seconds"), metrics={"AR100": 0.5})
    put("c4", 2, fingerprint="f" * 16, status="running", finished=None, code="older")
    assert shown(runs)[1]["baseline on conv4", 2].kind == "finished"


def test_the_page_is_written_while_a_sweep_runs_and_once_more_if_it_was_killed(put, runs, tmp_path):
    put("c4", 2)
    with planned_sweep(runs, CELLS) as sweep:
        command = [sys.executable, "-m", "fpn_ablate", "report", runs, "--out", tmp_path, "--watch"]
        watching = subprocess.Popen(command)
        page, end = tmp_path / "report.html", time.monotonic() + 60
        while not page.exists() and time.monotonic() < end:
            time.sleep(0.1)
        assert "data-reload=" in page.read_text() and "1 of 4 runs done" in page.read_text()
        assert subprocess.run(command, timeout=60).returncode == 0, "a second one leaves"
        sweep.kill()
        sweep.wait()
        assert watching.wait(60) == 0
    assert "<body data-reload=" not in page.read_text()

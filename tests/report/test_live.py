"""Plans of sweeps, how far the page says they are, and the process that writes it."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
import torch

from fpn_ablate.cli.report import main
from fpn_ablate.cli.run import main as command_line
from fpn_ablate.report import output
from fpn_ablate.report import output as report
from fpn_ablate.report.collate.collate import collate
from fpn_ablate.report.collate.records import load
from fpn_ablate.report.html import live
from fpn_ablate.report.html import progress as reporting
from fpn_ablate.report.html.progress import progress
from fpn_ablate.runs import environment
from fpn_ablate.store import plan
from fpn_ablate.sweep.publish import publish

CELLS = [plan.PlannedRun("table1_rpn", "quick", "shapes", row, seed, 500) for row in ("c4", "fpn") for seed in (2, 3)]
NOW = "2027-01-01T00:00:00+00:00"


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def as_if_written_by(file, **changes):
    if "process" in changes:
        changes = {"born": plan._start_time(changes["process"])} | changes
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_plan_is_active_while_its_process_lives(runs):
    file = plan.write_plan(runs, CELLS)
    assert [found.cells for found in plan.active_plans(runs)] == [tuple(CELLS)]
    as_if_written_by(file, process=dead_process())
    assert plan.active_plans(runs) == [] and plan.has_leftover_plan(runs)
    as_if_written_by(file, process=1)  # of another user, perhaps
    assert len(plan.active_plans(runs)) == 1
    as_if_written_by(file, process=1, born="12")  # that number again, and another process
    assert plan.active_plans(runs) == []


def test_the_end_takes_a_plan_away_and_the_next_sweep_those_of_the_dead(runs):
    file = plan.write_plan(runs, CELLS)
    other = file.with_name(f"{socket.gethostname()}-0.json")
    other.write_text(file.read_text())
    as_if_written_by(other, process=dead_process())
    plan.write_plan(runs, CELLS)
    assert not other.exists()
    plan.remove_plan(runs)
    assert not plan.has_leftover_plan(runs)


def test_a_plan_of_another_machine_is_over_after_a_week(runs):
    file = plan.write_plan(runs, CELLS)
    as_if_written_by(file, host=socket.gethostname() + "x", process=0)
    assert len(plan.active_plans(runs)) == 1
    assert plan.active_plans(runs, this_host=True) == []  # nobody watches what cannot be seen to end
    as_if_written_by(file, started="2020-01-01T00:00:00+00:00")
    assert plan.active_plans(runs) == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"cells": [1]}', '{"cells": []}'])
def test_a_damaged_plan_is_none(runs, content):
    plan.write_plan(runs, CELLS).write_text(content)
    assert plan.active_plans(runs) == []


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
    assert found.cells == 4 and [found.count(kind) for kind in reporting.MARKS] == [1, 1, 1, 1]


def test_what_older_code_has_finished_is_waiting_now(put, runs):
    put("c4", 2, code="older")
    plan.write_plan(runs, CELLS, "present")
    assert shown(runs)[1]["baseline on conv4", 2].kind == "waiting"


def test_a_failure_of_an_earlier_sweep_is_waiting_now(put, runs):
    put("c4", 2, status="failed", error="ValueError: no")
    plan.write_plan(runs, CELLS)
    assert shown(runs)[1]["baseline on conv4", 2].kind == "waiting"


def test_the_page_is_written_while_a_sweep_runs_and_once_more_if_it_was_killed(put, runs, tmp_path, monkeypatch):
    put("c4", 2)
    sweep = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    file = plan.write_plan(runs, CELLS)
    as_if_written_by(file, process=publish.pid)
    command = [sys.executable, "-m", "fpn_ablate", "report", runs, "--out", tmp_path, "--watch"]
    watching = subprocess.Popen(command)
    page, end = tmp_path / "report.html", time.monotonic() + 60
    while not page.exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert "data-reload=" in page.read_text() and "1 of 4 cells" in page.read_text()
    assert subprocess.run(command, timeout=60).returncode == 0, "a second one leaves"
    publish.kill()
    publish.wait()
    assert watching.wait(60) == 0
    assert "<body data-reload=" not in page.read_text()


def test_the_report_writes_the_page_of_one_table_or_all(put, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(live.SWITCH, raising=False)
    monkeypatch.setattr(output, "save_table", lambda *_: None)  # its plots take seconds
    put("c4", 2)
    put("own", 2, table="own")
    assert main([str(runs), "--out", str(tmp_path)]) == 0
    assert "own-shapes-quick" in capsys.readouterr().out
    assert 'id="t2"' in (tmp_path / "report.html").read_text()
    assert main([str(runs), "--out", str(tmp_path), "--table", "own"]) == 0
    assert 'id="t2"' not in (tmp_path / "report.html").read_text()
    assert main([str(runs), "--out", str(tmp_path), "--table", "none"]) == 2
    assert "there are own-shapes-quick" in capsys.readouterr().err


@pytest.fixture
def cells(config, tmp_path):
    found = [config("ablation=c4", "seed=2"), config("ablation=fpn", "seed=2")]
    return [cfg.model_copy(update={"out": str(tmp_path)}) for cfg in found]


def test_a_sweep_leaves_word_starts_its_page_and_ends_both(cells, put, runs, tmp_path, monkeypatch):
    monkeypatch.delenv(live.SWITCH, raising=False)
    monkeypatch.setattr(report, "save_table", lambda *_: None)
    started = []
    monkeypatch.setattr(live, "start", lambda out, experiments: started.append(out))
    put("c4", 2, recipe="smoke")
    publish.start_progress(cells)
    assert started == [tmp_path]
    assert [(cell.row, cell.recipe, cell.steps) for cell in plan.active_plans(runs)[0].cells] == [
        ("c4", "smoke", cells[0].steps),
        ("fpn", "smoke", cells[0].steps),
    ]
    publish.publish(cells)
    assert not plan.has_leftover_plan(runs)
    assert "<body data-reload=" not in (tmp_path / live.NAME).read_text()


def test_a_page_that_fails_is_one_warning(cells, put, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(live.SWITCH, raising=False)
    monkeypatch.setattr(report, "save_table", lambda *_: None)
    monkeypatch.setattr("fpn_ablate.report.html.page.render", lambda *_, **__: 1 / 0)
    put("c4", 2, recipe="smoke")
    publish.publish(cells)
    found = capsys.readouterr()
    assert "report.html is not written: division by zero" in found.err and (tmp_path / "ledger.csv").exists()


def test_the_command_that_was_typed_is_in_the_record_and_decides_nothing(monkeypatch):
    monkeypatch.setenv(plan.COMMAND, "")
    assert command_line(["no.such.key=1 2"]) == 2
    assert environment.environment(torch.device("cpu"))["command"] == "python -m fpn_ablate 'no.such.key=1 2'"
    monkeypatch.delenv(plan.COMMAND)
    assert "command" not in environment.environment(torch.device("cpu"))

"""What a command says before it trains: rows, seeds, settings, and about how long it takes."""

import sys

import pytest

from fpn_ablate.store.pace import Pace
from fpn_ablate.sweep import announce
from fpn_ablate.sweep.announce import announce_run, announce_sweep


@pytest.fixture
def cell(config, tmp_path):
    return lambda *overrides: config("recipe=quick", "device=cpu", f"out={tmp_path}", *overrides)


@pytest.mark.parametrize("bare", [True, False])
def test_a_run_says_what_it_is_and_how_long_it_takes(cell, capsys, bare):
    announce_run(cell(), bare)
    *first, row, setting = capsys.readouterr().out.splitlines()
    assert row == "Row fpn of table1_rpn, seed 0: 500 steps, about 2 min"
    assert setting == "  generated data, recipe quick"
    assert first == ["No row is named: this trains fpn. --help lists rows, tables and commands."] * bare


def test_a_narrow_terminal_breaks_a_line_between_words(cell, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    announce_run(cell())
    assert capsys.readouterr().out.splitlines() == [
        "Row fpn of table1_rpn, seed 0: 500",
        "  steps, about 2 min",
        "  generated data, recipe quick",
    ]


def test_a_run_says_that_all_its_steps_are_warm_up(cell, capsys):
    announce_run(cell("recipe.steps=50"))
    assert "50 steps, all of them warm-up" in capsys.readouterr().out
    untrained = cell("task=faster_rcnn", "task.training=joint", "ablation=joint/image_pyramid_tested")
    announce_sweep([untrained], [untrained], 1)
    assert "warm-up" not in capsys.readouterr().out


def test_a_sweep_says_what_is_left_of_it(cell, capsys):
    cells = [cell(f"ablation={row}", f"seed={seed}") for seed in (0, 1) for row in ("c4", "fpn")]
    announce_sweep(cells, cells[1:], 2)
    assert capsys.readouterr().out.splitlines() == [
        "3 runs, 1 finished before, 2 at once, about 3 min: fpn, c4",
        "  seeds 0, 1, generated data, recipe quick",
    ]
    announce_sweep(cells, cells, None)  # elsewhere
    assert "about" not in capsys.readouterr().out


def test_the_time_counts_what_rows_build_on_once(cell, monkeypatch):
    """With 1 s a run: the RPN of all rows of Table 2, or of Table 5 the RPN and the second of the four steps."""
    times = []
    monkeypatch.setattr(announce, "expected_pace", lambda cfg: Pace(0.0, 1.0))
    monkeypatch.setattr(announce, "about", lambda seconds: str(times.append(seconds)))
    announce_sweep(rows := [cell("task=fast_rcnn", f"ablation={row}") for row in ("c4", "fpn")], rows, 1)
    announce_sweep(rows := [cell("task=faster_rcnn", "task.training=four_step")], rows, 1)
    monkeypatch.setattr(announce, "finished_record", lambda cfg: {})
    announce_sweep(rows, rows, 1)
    assert times == [3, 3, 3]
    monkeypatch.setattr(announce, "finished_record", lambda cfg: {"finished": True})
    announce_sweep(rows, rows, 1)
    assert times[-1] == 1


def test_the_time_is_that_of_the_rows_own_runs_and_unknown_without_any(cell, capsys, tmp_path, put):
    announce_run(cell("recipe=paper2017", "data.train_images=10"))
    assert "80k" not in (out := capsys.readouterr().out) and "time not known yet" in out
    place = put("c4", cost={"train_s": 6000.0, "eval_s": 600.0, "steps": 500})
    target = tmp_path / "runs" / "table1_rpn" / "quick" / "c4"
    target.mkdir(parents=True)
    place.rename(target / place.name)
    announce_run(cell("ablation=c4"))
    assert "about 1.8 h" in capsys.readouterr().out
    announce_run(cell("ablation=c5"))  # of the table's other rows
    assert "about 1.8 h" in capsys.readouterr().out
    put("c4", folder=target / "theirs", data="theirs", cost={"train_s": 60.0, "eval_s": 6.0, "steps": 500})  # newer
    announce_run(cell("ablation=c4"))
    assert "about 1.8 h" in capsys.readouterr().out
    announce_run(cell("ablation=c5", "backbone.weights=pretrain"))
    assert "after pre-training" in capsys.readouterr().out

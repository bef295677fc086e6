"""The trials by which recipes were chosen: kept once each, and shown as they are kept."""

import json
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[2] / "results"


@pytest.fixture
def leave(tmp_path):
    def leave(row, seed, recall, **keys):
        folder = tmp_path / "runs" / f"{row}{seed}"
        folder.mkdir(parents=True)
        metrics = dict.fromkeys(("AR100", "AR1k", "AR1k_s", "AR1k_m"), recall) | {"AR1k_l": None}
        record = {
            "fingerprint": f"{seed:016x}",
            "status": "finished",
            "task": "rpn",
            "row": row,
            "seed": seed,
            "metrics": metrics,
        }
        record |= {"data": "shapes", "recipe": "quick", "config": {"recipe": {"steps": 40}}}
        record |= {"environment": {"device": "cpu (X)", "threads": 1, "commit": "abc"}}
        (folder / "record.json").write_text(json.dumps(record | keys))
        lines = [{"step": step, "rpn_objectness": 0.1 / step} for step in (20, 40)] + [{"step": 40, "AR100": recall}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder.parent

    return leave


def test_each_run_is_kept_once_and_others_are_left_out(script, leave, tmp_path, capsys):
    trials, document = script("recipe_trials"), tmp_path / "README.md"
    document.write_text("before\n<!-- trials -->\n<!-- /trials -->\nafter\n")
    leave("fpn", 1, 0.5)
    leave("c4", 3, 0.9, status="diverged", metrics={})
    leave("mine", 4, 0.9)
    runs = leave("fpn", 2, 0.6)
    files = ["--csv", str(tmp_path / "t.csv"), "--plot", str(tmp_path / "t.png"), "--readme", str(document)]
    for _ in range(2):
        assert trials.main([str(runs), *files]) == 0
        line = "| shapes | quick | 40 |  |  | 55.0 / 55.0 (sd 7.1 / 7.1, n 2) |  |  |  |"
        assert line in capsys.readouterr().out.splitlines()
        assert line in document.read_text().splitlines()
    assert (tmp_path / "t.png").stat().st_size > 1000


def test_without_runs_nothing_is_written(script, tmp_path, capsys):
    assert script("recipe_trials").main([str(tmp_path), "--csv", str(tmp_path / "t.csv")]) == 2
    assert "no finished runs" in capsys.readouterr().err
    assert not (tmp_path / "t.csv").exists()


def test_the_committed_table_is_that_of_the_committed_trials(script):
    trials = script("recipe_trials")
    assert trials.table(trials._read(trials.REFERENCE / "trials.csv")) in (RESULTS / "README.md").read_text(encoding="utf-8")

"""Progress reports: the file of metrics, which is the truth."""

import json

import pytest

from fpn_ablate.tracking.loggers import JsonLines


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, *steps, resume_from=0):
    sink = JsonLines(path, resume_from)
    for step in steps:
        sink.log(step, {"loss": step / 10, "lr": 0.5})
    sink.close()


def test_one_line_a_step_at_once(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    sink = JsonLines(path)
    for step in (1, 2):
        sink.log(step, {"loss": step / 10, "lr": 0.5})
        assert lines(path)[-1] == {"step": step, "loss": step / 10, "lr": 0.5}
    sink.close()


@pytest.mark.parametrize(("resume_from", "steps"), [(2, [1, 2, 3, 4, 5]), (0, [3, 4, 5])])
def test_a_resumed_run_drops_what_lies_past_its_checkpoint_and_a_new_one_everything(tmp_path, resume_from, steps):
    path = tmp_path / "m.jsonl"
    write(path, 1, 2, 3, 4)
    write(path, 3, 4, 5, resume_from=resume_from)
    assert [line["step"] for line in lines(path)] == steps


def test_a_run_killed_in_its_evaluation_writes_the_line_of_that_once(tmp_path):
    path = tmp_path / "m.jsonl"
    for resume_from in (0, 1, 1):
        sink = JsonLines(path, resume_from)
        if not resume_from:
            sink.log(1, {"loss": 2.0, "lr": 0.5})
        sink.log(1, {"AR100": 0.5})
        sink.close()
    assert lines(path) == [{"step": 1, "loss": 2.0, "lr": 0.5}, {"step": 1, "AR100": 0.5}]


def test_a_kill_while_lines_are_dropped_costs_none(tmp_path, monkeypatch):
    path = tmp_path / "m.jsonl"
    write(path, 1, 2)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("os.fsync", killed)
        JsonLines(path, 1)
    assert [line["step"] for line in lines(path)] == [1, 2]


def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path):
    path = tmp_path / "m.jsonl"
    write(path, 1)
    path.write_text(path.read_text() + '{"step": 2, "lo\n[]\n{"loss": 1}\nnull\n')
    write(path, 2, resume_from=1)
    assert [line["step"] for line in lines(path)] == [1, 2]

"""Progress reports: the file of metrics, which is the truth."""

import json
import sys
import types

import pytest

from fpn_ablate.tracking.loggers import JsonLines, Throughput
from fpn_ablate.tracking.tensorboard_client import TensorBoard, require_tensorboard
from fpn_ablate.utils.errors import UserError


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


def test_the_pace_is_images_per_second_between_two_lines(tmp_path, monkeypatch):
    clock = iter((0.0, 4.0, 5.0, 9.0))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    for resumed in (False, True):
        throughput = Throughput(tmp_path / "throughput.jsonl", images=2)
        for step in (20, 40):
            throughput.log(step + 40 * resumed, {"loss": 1.0, "lr": 0.1})
        throughput.close()
    assert lines(tmp_path / "throughput.jsonl") == [{"step": 40, "images_per_s": 10.0}, {"step": 80, "images_per_s": 10.0}]
    unwritable = Throughput(tmp_path / "absent" / "throughput.jsonl", images=2)
    unwritable.close()


class Writer:
    """In place of TensorBoard's SummaryWriter, which the package tensorboard brings."""

    def __init__(self, folder, purge_step=None):
        self.made, self.lines, self.closed = (folder, purge_step), [], False
        Writer.last = self

    def add_scalar(self, name, value, step):
        if name.endswith("full"):
            raise OSError("No space left on device")
        self.lines.append((name, value, step))

    def close(self):
        self.closed = True


def test_tensorboard_gets_each_line_and_a_failure_costs_the_curves_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    board = TensorBoard(tmp_path, resumed_at=4)
    board.log(5, {"rpn_box": 0.5, "lr": 0.1})
    board.log(5, {"AR100": 0.4})
    board.close()
    assert Writer.last.made == (str(tmp_path / "tensorboard"), 5) and Writer.last.closed
    assert Writer.last.lines == [("train/rpn_box", 0.5, 5), ("train/lr", 0.1, 5), ("evaluation/AR100", 0.4, 5)]
    board = TensorBoard(tmp_path, resumed_at=0)
    for _ in range(2):
        board.log(6, {"full": 0.5, "lr": 0.1})
    board.close()
    assert capsys.readouterr().err == "warning: no curves for TensorBoard (OSError: No space left on device)\n"


def test_a_missing_tensorboard_is_named_with_the_command_that_installs_it(monkeypatch, config):
    assert (config().log.tensorboard, config("log=tensorboard").log.tensorboard) == (False, True)
    monkeypatch.setattr("fpn_ablate.tracking.tensorboard_client.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "fpn-ablate\[tensorboard\]"'):
        require_tensorboard()

"""What a terminal, a log file and the process of a sweep show of runs."""

import io
import json
import os
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console

from fpn_ablate.runs.run import run
from fpn_ablate.store.pace import Pace
from fpn_ablate.tracking import progress as tracking
from fpn_ablate.tracking.progress import Progress, Watch
from fpn_ablate.tracking.screen import Bar, Screen
from fpn_ablate.utils import signals
from fpn_ablate.utils.console import log_line


class Terminal(io.StringIO):
    """A terminal of `width` columns that interprets what rich writes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.lines, self.row = width, [""], 0

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        for part in re.findall(r"\x1b\[\??[\d;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", text):
            if part == "\n":
                self.row += 1
                self.lines += [""] * (self.row == len(self.lines))
            elif part == "\x1b[2K":
                self.lines[self.row] = ""
            elif part == "\x1b[1A":
                self.row -= 1
            elif not part.startswith(("\x1b", "\r")):
                self.lines[self.row] += part
                assert len(self.lines[self.row]) <= self.width, self.lines[self.row]
        return len(text)

    @property
    def shown(self) -> list[str]:
        return [line.rstrip() for line in self.lines if line.strip()]


@pytest.fixture
def clock(monkeypatch):
    """`clock.now` is the time in seconds."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(tracking.time, "monotonic", lambda: Clock.now)
    for name, value in (("done", 0.0), ("seconds", 0.0), ("after", [])):
        monkeypatch.setattr(Progress, name, value)
    for name in (tracking.STEPS, tracking.AT_ONCE, tracking.RELAY):
        monkeypatch.delenv(name, raising=False)
    return Clock


@pytest.fixture(params=[60, 80, 160])
def terminal(request):
    return Terminal(request.param)


def screen(terminal):
    return Screen(Console(file=terminal, width=terminal.width, force_terminal=True, legacy_windows=False))


def test_bars_never_wrap_and_leave_nothing(clock, terminal, monkeypatch):
    monkeypatch.setenv(tracking.STEPS, "400,400,400")
    title = "retinanet/focal+recipe.optimizer.lr=0.01 seed 12"
    with Progress(title, 400, job=1, images=8, screen=screen(terminal)) as shown:
        for step in (1, 2, 3, 99, 100, 101, 398, 399):
            clock.now += 1.5 * (step - shown.step)
            shown.log(step, {"rpn_box": 0.25, "rpn_objectness": 0.5, "lr": 0.1})
        row, sweep = terminal.shown
        assert "399/400" in row and "loss 0.750" in row and row.endswith(" left")
        assert "row 2 of 3" in sweep and "left" in sweep
        shown.show("a line above")
        assert terminal.shown[0] == "a line above" and len(terminal.shown) == 3
    assert terminal.shown == ["a line above"]


def test_the_time_that_is_left_of_row_and_sweep(clock, monkeypatch):
    terminal = Terminal(80)
    monkeypatch.setenv(tracking.STEPS, "100,100,100,100,100,100")
    with Progress("fpn seed 4", 100, job=2, images=2, expected=Pace(2.0, 5.0), screen=screen(terminal)) as shown:
        assert "3:25 left" in terminal.shown[0]  # 100 steps of 2 s, and 5 s behind them: before any is done
        assert "13:40 left" in terminal.shown[1]
        shown.log(10, {"rpn_box": 0.5, "lr": 0.1})
        clock.now += 20
        shown.log(30, {"rpn_box": 0.125, "lr": 0.1})
        # 20 steps took 20 s.
        assert "30/100" in terminal.shown[0] and "2 images/s" in terminal.shown[0] and "1:15 left" in terminal.shown[0]
        clock.now += 70
        shown.log(100, {"rpn_box": 0.1, "lr": 0.1})
        shown.begin("evaluating", 50)
        clock.now += 10
        shown.advance(25)
        assert "25/50" in terminal.shown[0] and "evaluating" in terminal.shown[0] and "0:10 left" in terminal.shown[0]
        clock.now += 10
    with Progress("c4 seed 4", 100, job=3, screen=screen(terminal)):
        assert "2:00 left" in terminal.shown[0]  # at the pace of the row before, and its 20 s of evaluation
        assert "6:00 left" in terminal.shown[1]


def test_steps_show_between_the_lines_of_the_log(clock):
    terminal = Terminal(80)
    with Progress("fpn seed 0", 500, images=8, parts=2, screen=screen(terminal)) as shown:
        for _ in range(6):
            clock.now += 1
            shown.advance_part()
        assert "3/500" in terminal.shown[0] and "4 images/s" in terminal.shown[0]


def test_a_run_tells_its_display_of_each_part_and_each_step_of_pretraining(config, tmp_path, monkeypatch):
    parts, steps = [], []
    monkeypatch.setattr(Progress, "advance_part", lambda self: parts.append(1))
    monkeypatch.setattr(Progress, "pretrained", lambda self, step, total, loss: steps.append((step, total, loss is None)))
    cfg = config("backbone.weights=pretrain", "recipe.accumulate=2", "recipe.batch_size=2", f"out={tmp_path}")
    run(cfg)
    assert len(parts) == 2 * cfg.steps
    assert [step for step, total, _ in steps] == list(range(1, cfg.recipe.pretrain.steps + 1))


def test_pretraining_is_shown_from_its_first_step(clock, config, tmp_path, monkeypatch):
    terminal = Terminal(80)
    monkeypatch.setattr(tracking, "Screen", lambda: screen(terminal))
    monkeypatch.setattr(tracking.sys.stderr, "isatty", lambda: True)
    cfg = config("backbone.weights=pretrain", f"out={tmp_path}")
    with tracking.preparing(cfg, 0) as report:
        assert "0/3" in terminal.shown[0] and "pre-training" in terminal.shown[0]
        for step in (1, 2):
            clock.now += 3
            report(step, None)
        assert "2/3" in terminal.shown[0] and "0:03 left" in terminal.shown[0]
        clock.now += 3
        report(3, 1.234)
        assert "3/3" in terminal.shown[0] and "loss 1.234" in terminal.shown[0] and len(terminal.shown) == 1


def test_a_log_file_gets_a_line_a_minute_and_none_a_step(clock, capsys, monkeypatch):
    monkeypatch.setenv(tracking.STEPS, "1000,1000")
    with Progress("fpn seed 0", 1000, start=3, images=4) as shown:
        for step in range(4, 1001):
            clock.now += 0.25
            shown.log(step, {"loss": 1.0, "lr": 0.1})
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == "fpn seed 0: resumes at step 3 of 1000"
    assert len(lines) == 4
    pattern = r"fpn seed 0: step \d+/1000, loss 1\.000, 16 images/s, \d:\d\d left; row 1 of 2, \d:\d\d left"
    assert all(re.fullmatch(pattern, line) for line in lines), lines


@pytest.mark.parametrize("live", [True, False])
def test_a_first_signal_is_answered_at_once(clock, capsys, live):
    terminal = Terminal(80)
    with (
        pytest.raises(signals.Stopped),
        Progress("fpn seed 0", 500, start=311, screen=screen(terminal) if live else None),
        signals.handling_signals(),
        signals.between_steps(),
    ):
        os.kill(os.getpid(), signals.signal.SIGINT)
        told = terminal.shown[1] if live else capsys.readouterr().err.splitlines()[-1]
        assert told == "finishing step 312, then saving; Ctrl-C again: stop now"


def test_a_sweep_shows_its_workers_and_their_lines(clock, terminal, monkeypatch):
    monkeypatch.setenv(tracking.STEPS, "100,100,100")
    monkeypatch.setattr(tracking, "_relayed", False)
    with Watch(range(3), 2, screen(terminal)) as watch:
        watch.draw()
        assert "0 of 3 rows, starting" in terminal.shown[-1]
        with monkeypatch.context() as worker:
            worker.setenv(tracking.RELAY, watch.environment[tracking.RELAY])
            for name in ("stdout", "stderr"):
                worker.setattr(sys, name, getattr(sys, name))
            tracking.relay_lines()
            print("of another library", file=sys.stderr)
            with Progress("fpn seed 0", 100, job=1, images=2) as shown:
                for step in (1, 11):
                    clock.now += 10
                    shown.log(step, {"loss": 0.5, "lr": 0.1})
                log_line("a line of the worker")
                clock.now += 1
                watch.draw()
                *above, row, sweep = terminal.shown
                assert above == ["of another library", "a line of the worker"]
                assert "fpn seed 0" in row and "11/100" in row and "1:29 left" in row
                assert "0 of 3 rows" in sweep and "left" in sweep
            log_line("fpn seed 0: finished")
        watch.ended.add(1)
        clock.now += 1
        watch.draw()
        assert "1 of 3 rows" in terminal.shown[-1]
        assert watch.on_deferred() == "finishing the step of each row, then saving"
    assert terminal.shown == ["of another library", "a line of the worker", "fpn seed 0: finished"]


def test_a_stopping_sweep_does_not_count_its_rows_as_done(clock, terminal, monkeypatch):
    drawn = []
    with Watch(range(3), 2, screen(terminal)) as watch:
        monkeypatch.setattr(watch.screen, "draw", drawn.extend)
        watch.ended.add(0)
        watch.draw()
        monkeypatch.setattr(signals, "pending_signal", lambda: signals.signal.SIGINT)
        watch.ended |= {1, 2}
        watch.draw()
    assert [(bar.done, bar.total) for bar in drawn] == [(1, 3), (1, 3)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_worker_s_lines_may_be_lost():
    stream = tracking._Lines(io.FileIO("/dev/full", "a"), "utf-8", write_through=True)
    print("a line", file=stream, flush=True)
    stream.close()


def test_without_a_terminal_workers_print_themselves(monkeypatch):
    with Watch(range(3), 2) as watch:
        watch.draw()
        assert not watch.environment


def test_a_torn_state_of_a_worker_is_skipped(clock, monkeypatch):
    terminal = Terminal(80)
    with Watch([0], 1, screen(terminal)) as watch:
        (watch.folder / "1.json").write_text('{"title": "x"')
        (watch.folder / "2.json").write_text(json.dumps({"no": 1}))
        watch.draw()
        assert len(terminal.shown) == 1


def test_a_terminal_that_is_narrow_cuts_the_title(clock):
    terminal = Terminal(40)
    display = screen(terminal)
    display.draw([Bar("a title that is far too long for it", 1, 2, "100/200", "loss 0.500", "1:00 left")], at_once=True)
    assert "100/200" in terminal.shown[0] and "1:00 left" in terminal.shown[0]
    display.close()

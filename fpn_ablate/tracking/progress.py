"""Progress of a run: bars on a terminal, else few lines; a worker of a sweep passes its own on to the process of the sweep.

A `Progress` is a logger of one task: preparation with pre-training, or training and evaluation. `Watch` shows those of workers.
"""

import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Self

from fpn_ablate.config.schema import Config
from fpn_ablate.store.pace import Pace, expected_pace, needs_pretraining
from fpn_ablate.tracking.loggers import RATE
from fpn_ablate.tracking.screen import REFRESH, Bar, Screen
from fpn_ablate.utils import signals
from fpn_ablate.utils.console import duration, log_line

# Environment variables that a sweep sets for its jobs: the steps of each, by its number; how many run at once; the folder
# through which a worker's progress and lines reach the process that shows them.
STEPS, AT_ONCE, RELAY = "FPN_ABLATE_STEPS", "FPN_ABLATE_AT_ONCE", "FPN_ABLATE_RELAY"
BEHIND = ("evaluating", "finishing")  # phases behind the last step
SPARSE = 60.0  # seconds between two lines where there is no terminal


@dataclass(frozen=True)
class State:
    """State of a task, as a worker passes it on. `left` and `after` are seconds, `after` those behind the last step."""

    title: str
    job: int
    done: float
    total: int
    phase: str = ""
    loss: float | None = None
    images_per_second: float | None = None
    left: float | None = None
    pace: float | None = None  # seconds a step
    after: float = 0.0

    def bar(self) -> Bar:
        count = f"{self.done:.0f}/{self.total}" if self.total else ""
        detail = [self.phase] if self.phase else []
        detail += [f"loss {self.loss:.3f}"] if self.loss is not None else []
        detail += [f"{self.images_per_second:.3g} images/s"] if self.images_per_second else []
        left = f"{duration(self.left)} left" if self.left is not None else ""
        return Bar(self.title, self.done, self.total, count, "  ".join(detail), left)


class Progress:
    """Show a task's steps, loss, images a second and the time that it and the sweep still take."""

    # Of this process, over all its runs.
    seconds: ClassVar[float] = 0.0
    done: ClassVar[float] = 0.0  # steps in `seconds`
    after: ClassVar[list[float]] = []  # seconds from the last step of each run to its end

    def __init__(
        self,
        title: str,
        steps: int,
        job: int = 0,
        start: int = 0,
        images: int = 0,
        parts: int = 1,
        expected: Pace | None = None,
        screen: Screen | None = None,
    ) -> None:
        """Open the display.

        Args:
            start: steps that an earlier start has done.
            images: of a step.
            parts: of a step.
            expected: before a step is done, the pace to expect.
        """
        self.title, self.steps, self.job, self.images, self.parts = title, steps, job, images, max(1, parts)
        self.expected = expected
        self.step, self.phase, self.loss = float(start), "", None
        self.total = steps
        self.begun: tuple[float, float] | None = None  # (step, time) of the first report of the phase
        self.last_step: float | None = None  # time of the last step's log line
        self.announced = time.monotonic()
        self.at_once = int(os.environ.get(AT_ONCE, "1"))
        self.sweep = [int(number) for number in os.environ.get(STEPS, "").split(",") if number]
        self._closing = ExitStack()
        self._closing.enter_context(signals.listening(self))
        self.relay = Path(os.environ[RELAY], f"{os.getpid()}.json") if RELAY in os.environ else None
        live = not self.relay and self.at_once == 1 and sys.stderr.isatty()
        self.screen = screen or (Screen() if live else None)
        if start:
            log_line(f"{title}: resumes at step {start} of {steps}", sys.stderr)
        self._show(at_once=True)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Take the losses of a step; the figures of the evaluation are those without a learning rate."""
        if RATE not in values:
            return
        now = time.monotonic()
        if self.begun is None:
            self.begun = float(step), now
        self.step = float(step)
        self.loss = sum(value for name, value in values.items() if name != RATE)
        if step >= self.steps:
            self.last_step = now
        self._show(at_once=step >= self.steps)

    def advance_part(self) -> None:
        """Note that a part of a step is done."""
        self._advance_to(min(self.step + 1 / self.parts, float(self.total)))

    def pretrained(self, step: int, total: int, loss: float | None) -> None:
        """Note that `step` steps of pre-training are done, with the loss of some of them."""
        self.phase, self.total = "pre-training", total
        self.loss = self.loss if loss is None else loss
        self._advance_to(float(step))

    def _advance_to(self, step: float) -> None:
        self.step = step
        if self.begun is None:  # at the end of a first step, which takes longer than others
            self.begun = step, time.monotonic()
        self._show()

    def on_deferred(self) -> str:
        if self.phase in BEHIND or not self.total:
            return "finishing what is being written"
        return f"finishing step {int(self.step) + 1}, then saving"

    def show(self, line: str) -> None:
        if self.screen:
            self.screen.print(line)
        else:
            log_line(line, sys.stderr)

    def begin(self, phase: str, total: int) -> None:
        """Begin another phase of the task, as the evaluation, of `total` images or steps."""
        if phase == "evaluating" and self.begun and self.last_step:
            Progress.done += self.step - self.begun[0]
            Progress.seconds += self.last_step - self.begun[1]
        self.phase, self.total, self.step, self.loss = phase, total, 0.0, None
        self.begun = (0.0, time.monotonic()) if phase == "evaluating" else None
        self._show(at_once=True)

    def advance(self, count: int) -> None:
        """Note that `count` more images of the phase are done."""
        self.step = min(self.step + count, float(self.total))
        self._show()

    def close(self) -> None:
        """Remove the display; you can call it as often as you like."""
        if self.last_step is not None and self.phase in BEHIND:
            Progress.after.append(time.monotonic() - self.last_step)
            self.last_step = None
        self._closing.close()
        if self.screen:
            self.screen.close()
        if self.relay:
            self.relay.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def state(self) -> State:
        pace, after = self._pace(), self._after()
        in_steps = self.phase not in BEHIND
        left = None if pace is None or not self.total else pace * (self.total - self.step)
        if left is not None and in_steps and self.phase != "pre-training":
            left += after
        speed = self.images / pace if in_steps and pace and self.images and self._measured() else None
        return State(self.title, self.job, self.step, self.total, self.phase, self.loss, speed, left, pace, after)

    def _measured(self) -> bool:
        return self.begun is not None and self.step > self.begun[0]

    def _pace(self) -> float | None:
        """Return the seconds of a step: measured ones of this task, else of the runs before it, else the expected ones."""
        if self.begun and self._measured():
            return (time.monotonic() - self.begun[1]) / (self.step - self.begun[0])
        if self.phase:
            return None
        if Progress.done:
            return Progress.seconds / Progress.done
        return self.expected.seconds_per_step if self.expected else None

    def _after(self) -> float:
        if Progress.after:
            return statistics.fmean(Progress.after)
        return self.expected.rest if self.expected else 0.0

    def _sweep_left(self, state: State) -> float | None:
        """Return the seconds that the rows of the sweep from this one on take, `at_once` at a time."""
        later = self.sweep[self.job + 1 :]
        pace = Progress.seconds / Progress.done if Progress.done else None
        if pace is None and not self.phase:
            pace = state.pace
        pace = pace or (self.expected.seconds_per_step if self.expected else None)
        own = state.left
        if self.phase == "pre-training" and own is not None and pace is not None:
            own += pace * self.steps + self._after()
        if own is None or (later and pace is None):
            return None
        return max(own, (own + sum(steps * (pace or 0.0) + self._after() for steps in later)) / self.at_once)

    def _bars(self) -> list[Bar]:
        state = self.state()
        bars = [state.bar()]
        if len(self.sweep) > 1:
            left = self._sweep_left(state)
            text = f"{duration(left)} left" if left is not None else ""
            done = self.job + (state.done / state.total if state.total else 0)
            count = f"row {self.job + 1} of {len(self.sweep)}"
            bars.append(Bar("sweep", done, len(self.sweep), "", count, text))
        return bars

    def _show(self, at_once: bool = False) -> None:
        if self.screen:
            self.screen.draw(self._bars(), at_once)
        elif self.relay:
            _write(self.relay, self.state(), at_once)
        elif self.step and self.total and time.monotonic() - self.announced >= SPARSE:
            self.announced = time.monotonic()
            row, *sweep = self._bars()
            words = [f"step {row.count}" if not self.phase else f"{self.phase} {row.count}", *row.detail.split("  "), row.left]
            line = f"{self.title}: {', '.join(word for word in words if word and word != self.phase)}"
            line += "".join(f"; {bar.detail}" + f", {bar.left}" * bool(bar.left) for bar in sweep)
            log_line(line, sys.stderr)


@contextmanager
def preparing(cfg: Config, job: int) -> Iterator[Callable[[int, float | None], None]]:
    """Show that a run's inputs are read, and the pre-training that may be part of it; yield what takes its steps and losses."""
    title = f"{cfg.row} seed {cfg.seed}"
    with Progress(title, cfg.steps, job, expected=expected_pace(cfg)) as progress:
        steps = cfg.recipe.pretrain.steps
        progress.begin(*(("pre-training", steps) if needs_pretraining(cfg) else ("preparing", 0)))
        yield lambda step, loss: progress.pretrained(step, steps, loss)


class _Lines(io.TextIOWrapper):
    """A stream that loses what a full disk does not take, so that no print ends a run."""

    def write(self, text: str) -> int:
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


def relay_lines() -> None:
    """In a worker whose sweep shows its progress: pass on all that is printed from now on, since both write to one terminal."""
    global _relayed
    if RELAY in os.environ and not _relayed:
        with suppress(OSError):  # the sweep has ended
            file = io.FileIO(Path(os.environ[RELAY], f"{os.getpid()}.lines"), "a")
            sys.stdout = sys.stderr = _Lines(file, "utf-8", "backslashreplace", write_through=True)
            _relayed = True


_relayed = False
_written = 0.0


def _write(path: Path, state: State, at_once: bool) -> None:
    global _written
    now = time.monotonic()
    if at_once or now - _written >= 3 * REFRESH:
        _written = now
        with suppress(OSError):  # the sweep has ended
            temporary = path.with_suffix(".new")
            temporary.write_text(json.dumps(asdict(state)))
            temporary.replace(path)


class Watch:
    """Show on a terminal the rows that workers train, and print their lines above; without a terminal do nothing.

    Attributes:
        environment: variables for the workers.
    """

    def __init__(self, jobs: Iterable[int], at_once: int, screen: Screen | None = None) -> None:
        """Open the display for these jobs of the sweep, `at_once` of them together."""
        steps = [int(number) for number in os.environ.get(STEPS, "").split(",") if number]
        self.steps = {job: steps[job] if job < len(steps) else 0 for job in jobs}
        self.at_once = at_once
        self.ended: set[int] = set()  # numbers of jobs
        self.pace, self.after = None, 0.0
        self.done = 0.0  # rows, as last drawn
        self.screen = screen or (Screen() if sys.stderr.isatty() else None)
        self.environment, self._closing, self._read = {}, ExitStack(), {}
        if self.screen:
            try:
                self.folder = Path(self._closing.enter_context(tempfile.TemporaryDirectory(prefix="fpn-ablate-")))
            except OSError:  # a full disk: the workers print their lines themselves
                self.screen = None
                return
            self.environment = {RELAY: str(self.folder)}
            self._closing.enter_context(signals.listening(self))

    def draw(self) -> None:
        """Read what the workers have written, and show it."""
        if not self.screen:
            return
        self._print_lines()
        states = self._states()
        self.screen.draw([*(state.bar() for state in states), self._sweep(states)])

    def on_deferred(self) -> str:
        states = self._states()
        if states and all(state.phase in BEHIND for state in states):
            return "finishing what is being written"
        return "finishing the step of each row, then saving"

    def show(self, line: str) -> None:
        self.screen.print(line)

    def close(self) -> None:
        if self.screen:
            self._print_lines()
            self.screen.close()
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _print_lines(self) -> None:
        for path in sorted(self.folder.glob("*.lines")):
            with suppress(OSError), path.open(encoding="utf-8", errors="replace") as file:
                file.seek(self._read.get(path, 0))
                text, newline, _ = file.read().rpartition("\n")
                self._read[path] = self._read.get(path, 0) + len(f"{text}{newline}".encode())
                for line in text.splitlines() if newline else ():
                    self.screen.print(line)

    def _states(self) -> list[State]:
        states = []
        for path in self.folder.glob("*.json"):
            with suppress(OSError, ValueError, TypeError):
                states.append(State(**json.loads(path.read_text())))
        return sorted(states, key=lambda state: state.job)

    def _sweep(self, states: Sequence[State]) -> Bar:
        """Return the line of the sweep: its time from the mean pace of the rows that run, or ran."""
        paces = [state.pace for state in states if state.pace and not state.phase]
        if paces:
            self.pace, self.after = statistics.fmean(paces), max(state.after for state in states)
        rest = {job: steps for job, steps in self.steps.items() if job not in self.ended}
        done = {state.job: 0.0 if state.phase == "pre-training" else state.done for state in states if state.total}
        done |= {state.job: float(rest.get(state.job, 0)) for state in states if state.phase in BEHIND}
        left = ""
        if self.pace and rest:
            steps = sum(max(0.0, number - done.get(job, 0.0)) for job, number in rest.items())
            whole = (steps * self.pace + len(rest) * self.after) / min(self.at_once, len(rest))
            longest = max((state.left or 0.0 for state in states), default=0.0)
            left = f"{duration(max(whole, longest))} left"
        shares = sum(min(1.0, done.get(job, 0.0) / max(1, number)) for job, number in rest.items())
        total = max(1, len(self.steps))
        detail = f"{len(self.ended)} of {total} rows" + ("" if states else ", starting" if rest else "")
        if signals.pending_signal():  # rows that stopped have ended, too, but are not done
            detail, left = "stopping", ""
        else:
            self.done = len(self.ended) + shares
        return Bar("sweep", self.done, total, "", detail, left)

"""Loggers of a run's progress: a JSON-lines file and the terminal; `wandb_client` has the one for Weights & Biases."""

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, Protocol

from fpn_ablate.utils.console import log_line
from fpn_ablate.utils.files import open_no_follow, save_text, unwritable

# Environment variables that a sweep sets for its jobs: the number of its runs, and how many of them run at once.
CELLS, AT_ONCE = "FPN_ABLATE_CELLS", "FPN_ABLATE_AT_ONCE"
RATE = "lr"  # in every line of a training, and not in that of an evaluation


class Logger(Protocol):
    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


def read_metrics(path: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield (step, values) of each line that `JsonLines` has written to a file, which may be missing or cut off."""
    with suppress(FileNotFoundError), path.open(errors="replace") as file:
        for line in file:
            with suppress(ValueError, KeyError, TypeError, AttributeError):
                values = json.loads(line)
                yield values.pop("step"), values


class JsonLines:
    """Append-only file of metrics with one line a step.

    A resumed run drops the lines past its checkpoint and those of the evaluation, which is repeated. Each line is flushed to
    the disk, so it is there before any later checkpoint.
    """

    def __init__(self, path: Path, resume_from: int = 0) -> None:
        lines = [
            json.dumps({"step": step, **values}) + "\n"
            for step, values in read_metrics(path)
            if step <= resume_from and RATE in values
        ]
        save_text(path, "".join(lines))
        self._file = open(path, "a", opener=open_no_follow)  # noqa: SIM115

    def log(self, step: int, values: dict[str, float]) -> None:
        try:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise unwritable(Path(self._file.name), error) from None

    def close(self) -> None:
        with suppress(OSError):  # `log` has raised for the line that could not be written
            self._file.close()


class Pace:
    """Append the images per second since the last line to a file, for the page. A file that cannot be written costs nothing."""

    def __init__(self, path: Path, images: int) -> None:
        """Log a training of `images` a step."""
        self.images, self.last, self._file = images, (0, math.inf), None
        with suppress(OSError):
            self._file = open(path, "a", opener=open_no_follow, buffering=1)  # noqa: SIM115

    def log(self, step: int, values: dict[str, float]) -> None:
        (last, then), now = self.last, time.monotonic()
        self.last = step, now
        if self._file and now > then and step > last and RATE in values:
            with suppress(OSError):
                self._file.write(
                    json.dumps({"step": step, "images_per_s": round((step - last) * self.images / (now - then), 2)}) + "\n"
                )

    def close(self) -> None:
        if self._file:
            with suppress(OSError):
                self._file.close()


class Console:
    """A progress line with the time left for the run and for the sweep; in a log file, and where rows run at once, a line at
    every tenth of the steps."""

    # Of this process, over all its runs.
    seconds: ClassVar[float] = 0.0
    done: ClassVar[int] = 0  # steps in `seconds`

    def __init__(self, title: str, steps: int, job: int = 0) -> None:
        self.title, self.steps, self.job = title, steps, job
        self.cells, self.at_once = (int(os.environ.get(name, "1")) for name in (CELLS, AT_ONCE))
        self.live = sys.stderr.isatty() and self.at_once == 1
        self.last: tuple[int, float] | None = None
        self.tenth = -1

    def log(self, step: int, values: dict[str, float]) -> None:
        now = time.monotonic()
        if self.last:
            Console.done += step - self.last[0]
            Console.seconds += now - self.last[1]
        self.last = step, now
        tenth = 10 * step // max(self.steps, 1)
        if not self.live and tenth == self.tenth:
            return
        self.tenth = tenth
        losses = " ".join(f"{name.removeprefix('rpn_')} {value:.3f}" for name, value in values.items() if name != "lr")
        text = f"{self.title}: step {step}/{self.steps} {losses}, {self._time_for(self.steps - step)} left"
        if not self.steps:  # a run that evaluates alone
            text = f"{self.title}: {losses}"
        if self.cells > 1:
            own, later = self.steps - step, (self.cells - self.job - 1) * self.steps
            left = self._time_for(max(own, (own + later) // self.at_once))
            text += f"; row {self.job + 1} of {self.cells}"
            text += f", training {left} left" if Console.done else ""  # unknown until a pace is
        log_line(f"\r\x1b[2K{text}" if self.live else text, sys.stderr, end="" if self.live else "\n")

    def _time_for(self, steps: int) -> str:
        """Estimate the minutes and seconds that `steps` more take, at the mean pace so far."""
        if not steps:
            return "0:00"
        if not Console.done:
            return "?"
        minutes, seconds = divmod(int(Console.seconds / Console.done * steps), 60)
        return f"{minutes}:{seconds:02d}"

    def close(self) -> None:
        if self.live and self.last:
            log_line("", sys.stderr)

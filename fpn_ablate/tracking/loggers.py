"""Where a run's progress goes: a JSON-lines file, the terminal, and a copy for wandb that cannot hurt a run.

`python -m fpn_ablate replay RUN` makes that copy of finished runs, later.
"""

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, Protocol

from fpn_ablate.utils.console import log_line
from fpn_ablate.utils.files import save_text, unwritable

# Set by the sweep for its jobs: how many cells it has.
CELLS = "FPN_ABLATE_CELLS"
RATE = "lr"  # every line of a training has it, that of an evaluation has not


class Logger(Protocol):
    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self, exit_code: int = 0) -> None: ...


class JsonLines:
    """Append-only metrics. A resumed run drops the lines past its checkpoint, and those of an evaluation, which is done again:
    each step stands there once. Lines reach the disk before a checkpoint that is saved after them does."""

    def __init__(self, path: Path, resume_from: int = 0) -> None:
        kept = []
        if path.exists():
            for line in path.read_text(errors="replace").splitlines():
                try:
                    values = json.loads(line)
                    if values["step"] <= resume_from and RATE in values:
                        kept.append(line + "\n")
                except (ValueError, KeyError, TypeError):
                    continue  # cut off by a kill
        save_text(path, "".join(kept))
        self._file = path.open("a")

    def log(self, step: int, values: dict[str, float]) -> None:
        try:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise unwritable(Path(self._file.name), error) from None

    def close(self, exit_code: int = 0) -> None:
        with suppress(OSError):  # of a line that was not taken, which `log` has told
            self._file.close()


class Console:
    """A progress line with the time left for the run and for the sweep; in a log file, a line at every tenth."""

    spent: ClassVar[list[tuple[float, int]]] = []  # (seconds, steps) of the runs before this one in the same process

    def __init__(self, title: str, steps: int, job: int = 0) -> None:
        self.title, self.steps, self.job = title, steps, job
        self.cells = int(os.environ.get(CELLS, "1"))
        self.first: tuple[int, float] | None = None
        self.now: tuple[int, float] = (0, 0.0)
        self.tenth = -1

    def log(self, step: int, values: dict[str, float]) -> None:
        self.now = step, time.monotonic()
        self.first = self.first or self.now
        live, tenth = sys.stderr.isatty(), 10 * step // max(self.steps, 1)
        if not live and tenth == self.tenth:
            return
        self.tenth = tenth
        losses = " ".join(f"{name.removeprefix('rpn_')} {value:.3f}" for name, value in values.items() if name != "lr")
        text = f"{self.title}: step {step}/{self.steps} {losses}, {self._left(self.steps - step)} left"
        if self.cells > 1:
            later = (self.cells - self.job - 1) * self.steps
            text += f"; row {self.job + 1} of {self.cells}, training {self._left(self.steps - step + later)} left"
        log_line(f"\r\x1b[2K{text}" if live else text, sys.stderr, end="" if live else "\n")

    def _left(self, steps: int) -> str:
        """Minutes and seconds for `steps` more, at the mean pace so far."""
        spans = [*self.spent, self._span()]
        seconds, done = (sum(column) for column in zip(*spans, strict=True))
        if not steps:
            return "0:00"
        return "?" if not done else f"{int(seconds / done * steps) // 60}:{int(seconds / done * steps) % 60:02d}"

    def _span(self) -> tuple[float, int]:
        return (self.now[1] - self.first[1], self.now[0] - self.first[0]) if self.first else (0.0, 0)

    def close(self, exit_code: int = 0) -> None:
        self.spent.append(self._span())
        if sys.stderr.isatty() and self.first:
            log_line("", sys.stderr)

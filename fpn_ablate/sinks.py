"""Where a run's progress goes: a JSON-lines file, the terminal, and, if asked for, a copy to wandb that cannot hurt a run."""

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any, ClassVar, Protocol

from fpn_ablate.schema import Config

# Set by the sweep for its jobs: how many cells it has.
CELLS = "FPN_ABLATE_CELLS"


class Sink(Protocol):
    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self, exit_code: int = 0) -> None: ...


class JsonLines:
    """Append-only metrics. A resumed run drops the lines past its checkpoint, so each step stands there once."""

    def __init__(self, path: Path, resume_from: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= resume_from:
                        kept.append(line)
                except (ValueError, KeyError, TypeError):
                    continue  # cut off by a kill
        self._file = path.open("w")
        self._file.writelines(line + "\n" for line in kept)

    def log(self, step: int, values: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def close(self, exit_code: int = 0) -> None:
        self._file.close()


class Wandb:
    """One wandb run. Whatever goes wrong there is one warning here."""

    def __init__(self, cfg: Config, fingerprint: str, folder: Path) -> None:
        self._run: Any = None
        self._guard("start", lambda: self._start(cfg, fingerprint, folder))

    def _start(self, cfg: Config, fingerprint: str, folder: Path) -> None:
        import wandb  # takes seconds: only if asked for

        self._run = wandb.init(
            project=cfg.log.project,
            dir=folder,
            id=fingerprint,
            group=cfg.table[:128],
            job_type=cfg.row[:64],
            name=f"{cfg.row}-seed{cfg.seed}"[:128],
            config=cfg.model_dump(mode="json"),
            mode=cfg.log.wandb,
            resume="allow",
            reinit="finish_previous",
            settings=wandb.Settings(silent=True),
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self._guard("log", lambda: self._run and self._run.log(values, step=step))

    def close(self, exit_code: int = 0) -> None:
        self._guard("finish", lambda: self._run and self._run.finish(exit_code=exit_code))

    def _guard(self, what: str, call: Any) -> None:
        try:
            call()
        except Exception as error:
            warnings.warn(f"wandb could not {what} ({error}); the run goes on with its local files", stacklevel=3)
            self._run = None


class Console:
    """A progress line with the time left for the run and for the sweep; in a log file, a line at every tenth."""

    spent: ClassVar[list[tuple[float, int]]] = []  # (seconds, steps) of the runs before this one in the same process

    def __init__(self, cfg: Config, job: int = 0) -> None:
        self.title, self.steps, self.job = f"{cfg.row} seed {cfg.seed}", cfg.steps, job
        self.cells = int(os.environ.get(CELLS, "1"))
        self.first: tuple[int, float] | None = None
        self.now: tuple[int, float] = (0, 0.0)
        self.tenth = -1

    def log(self, step: int, values: dict[str, float]) -> None:
        self.now = step, time.monotonic()
        self.first = self.first or self.now
        live, tenth = sys.stderr.isatty(), 10 * step // self.steps
        if not live and tenth == self.tenth:
            return
        self.tenth = tenth
        losses = " ".join(f"{name.removeprefix('rpn_')} {value:.3f}" for name, value in values.items() if name != "lr")
        text = f"{self.title}: step {step}/{self.steps} {losses}, {self._left(self.steps - step)} left"
        if self.cells > 1:
            later = (self.cells - self.job - 1) * self.steps
            text += f"; row {self.job + 1} of {self.cells}, training {self._left(self.steps - step + later)} left"
        print(f"\r\x1b[2K{text}" if live else text, end="" if live else "\n", file=sys.stderr, flush=True)

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
            print(file=sys.stderr)

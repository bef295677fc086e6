"""Loggers of a run's progress: a JSON-lines file; `progress` has the terminal, `wandb_client` the one for Weights & Biases."""

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from fpn_ablate.utils.files import open_no_follow, save_text, unwritable

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


class Throughput:
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

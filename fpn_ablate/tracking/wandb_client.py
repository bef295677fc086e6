"""The run's side of its copy on wandb: starts the process that makes it, and waits for it a moment at the end."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from fpn_ablate.tracking.wandb_process import FAILED, KNOWN, NOTE
from fpn_ablate.utils.console import log_line
from fpn_ablate.utils.paths import PACKAGE

LOG = "wandb.log"  # in the run's folder: what the process that copies has to say


class Wandb:
    """A copy on wandb, made from the run's files by another process. The run waits for it a moment when it is over, and never
    else: a copy that fails, hangs or is killed costs a line on the terminal."""

    patience = 5.0  # seconds that a run waits for it when it is over

    def __init__(self, known: dict[str, Any], folder: Path, mode: str) -> None:
        self.folder, self._child = folder, None
        try:
            self._child = self._start(json.dumps({key: known.get(key) for key in KNOWN}).encode(), mode)
        except (OSError, ValueError, TypeError) as error:
            self._lost(str(error))

    def _start(self, known: bytes, mode: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "fpn_ablate.tracking.wandb_process", str(self.folder), mode]
        # The package is found there as it was here, wherever either was started.
        paths = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        variables = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        with (self.folder / LOG).open("w") as log:
            child = subprocess.Popen(
                command,
                bufsize=0,
                env=variables,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C and a closed terminal are the run's affair, and there is none to ask at
            )
        child.stdin.write(known + b"\n")
        return child

    def log(self, step: int, values: dict[str, float]) -> None:
        """Nothing: the other process reads what JsonLines writes."""

    def close(self, exit_code: int = 0) -> None:
        if self._child is None:
            return
        with suppress(OSError):  # it has ended already
            self._child.stdin.write(b"over\n")
            self._child.stdin.close()
        try:
            ended = self._child.wait(self.patience)
        except subprocess.TimeoutExpired:
            say_once(f"the copy for wandb takes longer and goes on by itself: {LOG} in the run's folder tells how it ends")
            return
        told = self._told()
        if ended:
            self._lost(told.get(FAILED, f"its process ended with {ended}"))
        elif NOTE in told:
            say_once(f"wandb: {told[NOTE]}")

    def _told(self) -> dict[str, str]:
        """The last note and the last failure in the log."""
        try:
            lines = (self.folder / LOG).read_text(errors="replace").splitlines()
        except OSError:
            return {}
        return {kind: line.removeprefix(kind) for line in lines for kind in (NOTE, FAILED) if line.startswith(kind)}

    def _lost(self, reason: str) -> None:
        retry = f"again with: python -m fpn_ablate replay {self.folder}"
        say_once(f"warning: no copy for wandb ({reason}); the run's own files are whole, {retry}")


def wandb_loggers(known: dict[str, Any], folder: Path, mode: str) -> list[Wandb]:
    """One, or none where it is switched off, by wandb's own variable too, or not installed."""
    if mode == "disabled" or os.environ.get("WANDB_MODE") == "disabled":
        return []
    if importlib.util.find_spec("wandb") is None:
        say_once("no copy for wandb: it is not installed (pip install wandb, or log.wandb=disabled)")
        return []
    return [Wandb(known, folder, mode)]


@functools.cache
def say_once(line: str) -> None:
    log_line(line, sys.stderr)

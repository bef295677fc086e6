"""Start the process that copies a run to Weights & Biases, and wait for it briefly when the run ends."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from fpn_ablate.tracking.wandb_process import DESCRIPTION_KEYS, FAILED, NOTE
from fpn_ablate.utils.console import log_line
from fpn_ablate.utils.paths import PACKAGE

LOG = "wandb.log"  # output of the copying process, in the run's folder


class Wandb:
    """A logger whose copy on wandb is made from the run's files by another process.

    The run waits for it only when it ends, for `close_timeout`. A copy that fails, hangs or is killed costs one line of output.
    """

    close_timeout = 5.0  # seconds

    def __init__(self, description: dict[str, Any], folder: Path, mode: str) -> None:
        self.folder, self._child = folder, None
        try:
            self._child = self._start(json.dumps({key: description.get(key) for key in DESCRIPTION_KEYS}).encode(), mode)
        except (OSError, ValueError, TypeError) as error:
            self._warn(str(error))

    def _start(self, description: bytes, mode: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "fpn_ablate.tracking.wandb_process", str(self.folder), mode]
        # The child finds the same package, whatever its working directory.
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
                start_new_session=True,  # Ctrl-C and a closed terminal must not reach it, nor may it prompt there
            )
        child.stdin.write(description + b"\n")
        return child

    def log(self, step: int, values: dict[str, float]) -> None:
        """Do nothing: the other process reads what JsonLines writes."""

    def close(self, exit_code: int = 0) -> None:
        if self._child is None:
            return
        with suppress(OSError):  # it has exited already
            self._child.stdin.write(b"over\n")
            self._child.stdin.close()
        try:
            exit_status = self._child.wait(self.close_timeout)
        except subprocess.TimeoutExpired:
            log_once(
                f"the wandb copy takes longer and continues in the background; {LOG} in the run's folder will show the result"
            )
            return
        messages = self._messages()
        if exit_status:
            self._warn(messages.get(FAILED, f"its process ended with {exit_status}"))
        elif NOTE in messages:
            log_once(f"wandb: {messages[NOTE]}")

    def _messages(self) -> dict[str, str]:
        """Read the last note and the last failure from the log."""
        try:
            lines = (self.folder / LOG).read_text(errors="replace").splitlines()
        except OSError:
            return {}
        return {kind: line.removeprefix(kind) for line in lines for kind in (NOTE, FAILED) if line.startswith(kind)}

    def _warn(self, reason: str) -> None:
        retry = f"retry with: python -m fpn_ablate replay {self.folder}"
        log_once(f"warning: no wandb copy ({reason}); the run's own files are complete; {retry}")


def wandb_loggers(description: dict[str, Any], folder: Path, mode: str) -> list[Wandb]:
    """Start one logger, or none if wandb is switched off, also by its own WANDB_MODE, or not installed."""
    if mode == "disabled" or os.environ.get("WANDB_MODE") == "disabled":
        return []
    if importlib.util.find_spec("wandb") is None:
        log_once("no wandb copy: wandb is not installed (pip install wandb, or log.wandb=disabled)")
        return []
    return [Wandb(description, folder, mode)]


@functools.cache
def log_once(line: str) -> None:
    log_line(line, sys.stderr)

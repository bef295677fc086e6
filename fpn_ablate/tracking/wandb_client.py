"""Copy a run to Weights & Biases. A copy that fails, hangs or is killed costs a run one line of output and CLOSE_TIMEOUT."""

import functools
import hashlib
import json
import logging
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from fpn_ablate.store import record
from fpn_ablate.tracking.loggers import read_metrics
from fpn_ablate.tracking.wandb_media import images_with_boxes, result_tables
from fpn_ablate.utils import signals
from fpn_ablate.utils.console import log_line
from fpn_ablate.utils.files import refuse_links_out, save_text
from fpn_ablate.utils.paths import METRICS, without_folders

MARKER = "wandb.json"  # in the folder of a run: where its complete copy is
CONFIG_KEYS = ("fingerprint", "data", "generated", "code", "environment")  # added to wandb's configuration, for its search
# Seconds for the remaining work after the run is over; pictures may take a slow network a while.
CLOSE_TIMEOUT = {"offline": 10.0, "online": 60.0}
SIGNAL_TIMEOUT = 3.0  # after SIGTERM or Ctrl-C; the process has about ten seconds in all
# Nothing may prompt, capture output or measure the system. Settings that the installed version lacks are skipped.
SETTINGS = {
    "silent": True,
    "show_errors": False,
    "console": "off",
    "save_code": False,
    "disable_code": True,
    "disable_git": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_disable_machine_info": True,
    "x_save_requirements": False,
    "init_timeout": 20.0,  # seconds without a network until the copy is an offline one
    "finish_timeout_raises": True,
}


class Wandb(Thread):
    """A logger that hands each line to a thread of its own, since any call of wandb may block or raise."""

    def __init__(self, description: dict[str, Any], folder: Path, mode: str) -> None:
        """Begin a copy with what the run's file of metrics holds already.

        Args:
            description: `Run.describe`, or the record of a finished run.
            mode: "online" or "offline".
        """
        super().__init__(name="wandb", daemon=True)
        self.description, self.folder, self.mode = description, folder.resolve(), mode
        self.failure = self.note = ""
        self.lines: SimpleQueue[tuple[int, dict[str, float]] | None] = SimpleQueue()
        for line in read_metrics(folder / METRICS):
            self.lines.put(line)
        try:
            # Not in the thread: a loader's worker that is forked during an import may wait for ever for the lock of a module.
            import wandb  # noqa: F401

            logging.getLogger("wandb").propagate = False  # to the terminal, in the end
            logging.raiseExceptions = False  # a traceback for each line that a full disk does not take
            self.start()
        except Exception as error:
            self.failure = _in_words(error)

    def log(self, step: int, values: dict[str, float]) -> None:
        self.lines.put((step, values))

    def close(self, timeout: float | None = None) -> None:
        """Wait for the copy; if it takes longer, kill wandb's service, for which Python would wait again when it exits."""
        timeout = SIGNAL_TIMEOUT if signals.pending_signal() else timeout or CLOSE_TIMEOUT[self.mode]
        self.lines.put(None)
        if self.ident:
            self.join(timeout)
        if self.is_alive():
            _kill_service()
            self.join(1.0)
            self.failure = f"not done {timeout:.0f} s after the end of the run"
        if self.failure:
            online = "--online " if self.mode == "online" else ""
            retry = f"retry with: python -m fpn_ablate replay {online}{self.folder}"
            log_once(f"warning: no wandb copy ({self.failure}); the run's own files are complete; {retry}")
        elif self.note:
            log_once(self.note)

    def run(self) -> None:
        """Copy the run; the thread's function."""
        import wandb

        try:
            self._copy()
        except BaseException as error:
            self.failure = _in_words(error)
            with suppress(BaseException):
                wandb.teardown()  # the next run starts a new service

    def _copy(self) -> None:
        (self.folder / MARKER).unlink(missing_ok=True)
        run = self._open()
        last = 0
        for step, values in iter(self.lines.get, None):
            if step >= max(run.starting_step, last):  # wandb may have lines of an earlier start already
                run.log(values, step=step)
            last = max(step, last)
        content = record.read(self.folder) or {}
        _send_result(run, self.folder, content, last)
        finished = content.get("status") == "finished"
        run.finish(exit_code=0 if finished else 1)
        if finished:
            place = os.path.relpath(Path(run.dir).parent, self.folder)
            marker = {"id": run.id, "mode": self.mode, "folder": place}
            save_text(self.folder / MARKER, json.dumps(marker, indent=1) + "\n")

    def _open(self) -> Any:
        """Open a wandb run, offline also if online is not possible."""
        refuse_links_out(self.folder, self.folder / "wandb")
        (self.folder / "wandb").mkdir(exist_ok=True)  # without it wandb would write to a temporary folder
        import wandb

        settings = wandb.Settings(**{key: value for key, value in SETTINGS.items() if key in wandb.Settings.model_fields})
        arguments = init_arguments(self.description) | {"dir": self.folder, "settings": settings}

        def start(**mode: str) -> Any:
            _remove_unsent(self.folder, arguments["id"])
            wandb.setup(settings)  # `init` alone would print, and prompt, whatever its settings say
            return wandb.init(**arguments, **mode)

        if self.mode == "online":
            try:
                return start(mode="online", resume="allow")
            except Exception as error:
                self.mode = "offline"
                self.note = f"wandb: not online ({_in_words(error)}); this is an offline copy, which `wandb sync` sends"
                wandb.teardown()  # the service still owns the id
        return start(mode="offline")


def wandb_loggers(description: dict[str, Any], folder: Path, mode: str) -> list[Wandb]:
    """Start one logger, or none if wandb is switched off, also by its own WANDB_MODE."""
    if mode == "disabled" or os.environ.get("WANDB_MODE") == "disabled":
        return []
    return [Wandb(description, folder, mode)]


def run_id(description: dict[str, Any]) -> str:
    """Return an id of a run in its table: the same run may be in several tables, each of which is a wandb group."""
    place = json.dumps([description[key] for key in ("table", "recipe", "row")])
    return f"{description['fingerprint']}-{hashlib.sha256(place.encode()).hexdigest()[:8]}"


def init_arguments(run: dict[str, Any]) -> dict[str, Any]:
    """Return a run's names for wandb.init, within its limits: 64 characters for a tag and a job type, 128 for the others."""
    tags = [run["task"], run["recipe"], run["data"], *(["generated data"] if run.get("generated") else [])]
    return {
        "project": run["config"].get("log", {}).get("project", "fpn_ablate")[:128],
        "id": run_id(run),
        # wandb averages over a group, so a group has one data set and one recipe.
        "group": " ".join((run["table"], run["data"], run["recipe"]))[:128],
        "job_type": run["row"][:64],
        "name": f"{run['row'][:100]}-seed{run['seed']}",
        "tags": list(dict.fromkeys(tag[:64] for tag in tags if tag)),
        "config": without_folders(run["config"] | {key: run.get(key) for key in CONFIG_KEYS}),
    }


def synced(copy: Path) -> bool:
    """Return whether `wandb sync` has sent an offline copy."""
    return any(copy.glob("*.wandb.synced"))


def _remove_unsent(folder: Path, identifier: str) -> None:
    """Remove older copies of this run that were not sent: the new one is complete, and both would be sent."""
    for old in (folder / "wandb").iterdir():
        if old.name.endswith(f"-{identifier}") and "run-" in old.name and not synced(old):
            shutil.rmtree(old, ignore_errors=True)


def _send_result(run: Any, folder: Path, result: dict[str, Any], step: int) -> None:
    """Send the metrics as summary, the first images with boxes, and tables of what is no single number."""
    import wandb

    if images := images_with_boxes(folder, result):
        # A panel each: wandb warns of a list whose pictures differ in size, as photographs do.
        pictures = {f"detections/{path.stem}": wandb.Image(str(path), boxes=boxes or None) for path, boxes in images}
        run.log(pictures, step=max(step, run.starting_step))
    for name, (columns, lines) in result_tables(result).items():
        run.log({name: wandb.Table(columns=columns, data=lines)}, step=max(step, run.starting_step))
    values = result.get("metrics", {}) | {f"cost/{name}": value for name, value in result.get("cost", {}).items()}
    summary = {name: value for name, value in values.items() if value is not None}
    run.summary.update({**summary, "status": result.get("status"), "error": without_folders(result.get("error"))})


def _kill_service() -> None:
    import wandb

    with suppress(Exception):  # wandb has no public way to it
        wandb.setup()._connection._proc._process.kill()


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@functools.cache
def log_once(line: str) -> None:
    log_line(line, sys.stderr)

"""Copy a run's local files to wandb in a separate process: `python -m fpn_ablate.tracking.wandb_process FOLDER MODE`.

`wandb_client.Wandb` starts it, for a run in progress or a finished one. The first line on standard input describes the run
(keys of record.json), the second says that it is over; if the input closes without the second, the run was killed. All else is
read from the run's files. A failure here cannot damage them, and the copy can be made again.
"""

import fcntl
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from fpn_ablate.tracking.wandb_media import images_with_boxes
from fpn_ablate.utils.console import log_line
from fpn_ablate.utils.files import save_text
from fpn_ablate.utils.paths import METRICS, RECORD

MARKER = "wandb.json"  # in the run's folder: the state of its copy
NOTE, FAILED = "note: ", "failed: "  # prefixes of lines for the user in the log
# Keys of the record that describe a run from its start. They must fit a pipe's buffer: the reader may hang.
DESCRIPTION_KEYS = (
    "fingerprint",
    "table",
    "recipe",
    "row",
    "seed",
    "data",
    "generated",
    "task",
    "config",
    "code",
    "environment",
)
CONFIG_KEYS = ("fingerprint", "data", "generated", "code", "environment")  # added to wandb's configuration, for its search
POLL = 2.0  # seconds between two reads of the metrics
FINISH_TIMEOUT = 120.0  # seconds for the remaining work after the run is over
# Nothing may prompt, capture output or measure the system. Settings that the installed version lacks are skipped.
SETTINGS = {
    "silent": True,
    "console": "off",
    "save_code": False,
    "disable_code": True,
    "disable_git": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_disable_machine_info": True,
    "x_save_requirements": False,
    "x_service_wait": 60.0,  # on a busy machine
    "init_timeout": 45.0,
    "finish_timeout": 0.75 * FINISH_TIMEOUT,
    "finish_timeout_raises": True,
}


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
        "config": run["config"] | {key: run.get(key) for key in CONFIG_KEYS},
    }


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; {} if the file is missing or unreadable."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def synced(copy: Path) -> bool:
    """Return whether `wandb sync` has sent an offline copy."""
    return any(copy.glob("*.wandb.synced"))


class RunMonitor(threading.Thread):
    """Waits for the end of the run (`over`, `killed`), then kills this process if it takes longer than FINISH_TIMEOUT."""

    def __init__(self, pipe: Any) -> None:
        super().__init__(daemon=True)
        self.pipe, self.over, self.killed = pipe, threading.Event(), False

    def run(self) -> None:
        self.killed = not self.pipe.readline()
        self.over.set()
        time.sleep(FINISH_TIMEOUT)
        log_line(f"{FAILED}not done {FINISH_TIMEOUT:.0f} s after the end of the run")
        os.killpg(os.getpgrp(), signal.SIGKILL)  # wandb's service exits with its client


def new_lines(path: Path) -> Iterator[list[tuple[int, dict[str, float]]]]:
    """Yield, each time, the lines written to a metrics file since the last time; a line that is cut off waits or is skipped."""
    position = 0
    while True:
        lines = []
        with suppress(FileNotFoundError), path.open("rb") as file:
            file.seek(position)
            complete = file.read().rpartition(b"\n")[0]
            position += len(complete) + 1 if complete else 0
            for line in complete.splitlines():
                with suppress(ValueError, KeyError, TypeError, AttributeError):
                    values = json.loads(line)
                    lines.append((int(values.pop("step")), values))
        yield lines


def follow(run: Any, path: Path, monitor: RunMonitor) -> int:
    """Log to wandb what a run writes until it is over, without the steps that wandb already has. Return the last step."""
    last, batches = 0, new_lines(path)
    while True:
        over, lines = monitor.over.is_set(), next(batches)  # in this order: the last lines are written before the run is over
        for step, values in lines:
            if step >= max(run.starting_step, last):
                run.log(values, step=step)
            last = max(step, last)
        if over and not lines:
            return last
        monitor.over.wait(POLL)


def open_run(description: dict[str, Any], folder: Path, mode: str) -> tuple[Any, str]:
    """Open a wandb run and return it with its mode, which is offline also if online is not possible."""
    (folder / "wandb").mkdir(exist_ok=True)  # without it wandb would write to a temporary folder
    import wandb

    settings = wandb.Settings(**{key: value for key, value in SETTINGS.items() if key in wandb.Settings.model_fields})
    arguments = init_arguments(description) | {"dir": folder, "settings": settings}
    _remove_unsent(folder, arguments["id"])
    if mode == "online":
        try:
            return wandb.init(**arguments, mode="online", resume="allow"), mode
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            log_line(f"{NOTE}not online ({reason}); this is an offline copy, which `wandb sync` sends")
            wandb.teardown()  # the service still owns the id
            _remove_unsent(folder, arguments["id"])
    return wandb.init(**arguments, mode="offline"), "offline"


def _remove_unsent(folder: Path, identifier: str) -> None:
    """Remove older copies of this run that were not sent: the new one is complete, and both would be sent."""
    for old in (folder / "wandb").glob(f"*run-*-{identifier}"):
        if not synced(old):
            shutil.rmtree(old, ignore_errors=True)


def send_result(run: Any, folder: Path, record: dict[str, Any], step: int) -> None:
    """Send the summary, the metrics as a table, and the pictures in the run's folder."""
    import wandb

    metrics = {name: value for name, value in record.get("metrics", {}).items() if value is not None}
    media: dict[str, Any] = {path.stem: wandb.Image(str(path)) for path in sorted(folder.iterdir()) if _is_picture(path)}
    if images := images_with_boxes(folder, record):
        media["detections"] = [wandb.Image(str(path), caption=path.stem, boxes=boxes or None) for path, boxes in images]
    if metrics:
        media["figures"] = wandb.Table(columns=["metric", "value"], data=[list(pair) for pair in metrics.items()])
    if media:
        run.log(media, step=max(step, run.starting_step))
    cost = {f"cost/{name}": value for name, value in record.get("cost", {}).items() if value is not None}
    run.summary.update({**metrics, **cost, "status": record["status"], "error": record.get("error")})


def _is_picture(path: Path) -> bool:
    return path.suffix in (".png", ".jpg") and not path.name.startswith(".")


def copy_run(description: dict[str, Any], folder: Path, mode: str, monitor: RunMonitor) -> None:
    """Copy a run until its end, from its start or from the step that wandb already has."""
    run, mode = open_run(description, folder, mode)
    place = os.path.relpath(Path(run.dir).parent, folder)
    state = {"id": run_id(description), "mode": mode, "folder": place, "step": 0, "complete": False}
    write_marker(folder, state)
    state["step"] = follow(run, folder / METRICS, monitor)
    record = {"status": "killed"} if monitor.killed else {"status": "no record"} | read_json(folder / RECORD)
    finished = record["status"] == "finished" and record.get("fingerprint") == description["fingerprint"]
    send_result(run, folder, record, state["step"])
    run.finish(exit_code=0 if finished else 1)
    write_marker(folder, {**state, "complete": finished})


def write_marker(folder: Path, state: dict[str, Any]) -> None:
    save_text(folder / MARKER, json.dumps(state, indent=1) + "\n")


def give_way() -> None:
    """Lower this process's priority below the training's, and wait until an older copy of the same run has finished."""
    with suppress(OSError):
        os.nice(5)
        Path("/proc/self/autogroup").write_text("5")  # by default Linux weighs nice values only within a session
    with suppress(OSError):
        fcntl.flock(1, fcntl.LOCK_EX)


def main(arguments: list[str]) -> int:
    folder, mode = Path(arguments[0]).resolve(), arguments[1]
    pipe = open(0, "rb", buffering=0, closefd=False)  # noqa: SIM115
    description = json.loads(pipe.readline())
    monitor = RunMonitor(pipe)
    monitor.start()
    give_way()
    os.environ.setdefault("WANDB_DATA_DIR", str(folder / "wandb"))  # tables, too, stay in the run's folder until they are sent
    try:
        copy_run(description, folder, mode, monitor)
    except BaseException as error:
        log_line(f"{FAILED}{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""A run's local files, copied to wandb by a process of its own: `python -m fpn_ablate.tracking.wandb_process FOLDER MODE`.

`sinks.Wandb` starts it, for a run that goes on and for one that is over. The first line on standard input says what the run is
(as in record.json), the second that it is over; an end without that line is that of a killed run. What is copied is read from
the run's files, so whatever happens here, they are whole, and the copy can be made again.
"""

import fcntl
import hashlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from fpn_ablate.tracking.wandb_media import drawn
from fpn_ablate.utils.console import log_line
from fpn_ablate.utils.files import save_text
from fpn_ablate.utils.paths import METRICS, RECORD

MARKER = "wandb.json"  # in the run's folder: what has been copied
MORE = ("fingerprint", "data", "generated", "code", "environment")  # of these, beside the configuration, a run is found
NOTE, FAILED = "note: ", "failed: "  # how lines for the user begin in the log
# What has to be known of a run from its beginning: keys of its record, few enough for a pipe to take them unread.
KNOWN = ("fingerprint", "table", "recipe", "row", "seed", "data", "generated", "task", "config", "code", "environment")
POLL = 2.0  # seconds between two looks at the metrics
LIMIT = 120.0  # seconds for all that is left to do when the run is over
# Nothing that asks, captures or measures. Those that the installed version does not know are left out.
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
    "finish_timeout": 0.75 * LIMIT,
    "finish_timeout_raises": True,
}


def run_id(known: dict[str, Any]) -> str:
    """Of a cell in its place: the same cell may stand in several tables, and each is a group of its own."""
    place = json.dumps([known[key] for key in ("table", "recipe", "row")])
    return f"{known['fingerprint']}-{hashlib.sha256(place.encode()).hexdigest()[:8]}"


def names(known: dict[str, Any]) -> dict[str, Any]:
    """What a run is called, within wandb's limits: 64 characters for a tag and a job type, 128 for the others."""
    tags = [known["task"], known["recipe"], known["data"], *(["generated data"] if known.get("generated") else [])]
    return {
        "project": known["config"].get("log", {}).get("project", "fpn_ablate")[:128],
        "id": run_id(known),
        # wandb averages a group: rows of other data or recipes are no part of it.
        "group": " ".join((known["table"], known["data"], known["recipe"]))[:128],
        "job_type": known["row"][:64],
        "name": f"{known['row'][:100]}-seed{known['seed']}",
        "tags": list(dict.fromkeys(tag[:64] for tag in tags if tag)),
        "config": known["config"]
        | {key: known.get(key) for key in ("fingerprint", "data", "generated", "code", "environment")},
    }


def read_json(path: Path) -> dict[str, Any]:
    """Empty where there is no such file or it cannot be read."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def synced(copy: Path) -> bool:
    """Whether `wandb sync` has sent a copy."""
    return any(copy.glob("*.wandb.synced"))


class End(threading.Thread):
    """Waits for the end of the run, and then LIMIT seconds for that of this process."""

    def __init__(self, pipe: Any) -> None:
        super().__init__(daemon=True)
        self.pipe, self.come, self.killed = pipe, threading.Event(), False

    def run(self) -> None:
        self.killed = not self.pipe.readline()
        self.come.set()
        time.sleep(LIMIT)
        log_line(f"{FAILED}not done {LIMIT:.0f} s after the end of the run")
        os.killpg(os.getpgrp(), signal.SIGKILL)  # wandb's service ends with the process that it serves


def new_lines(path: Path) -> Iterator[list[tuple[int, dict[str, float]]]]:
    """At each call, what has been written to a metrics file since the last one; lines that are cut off are left out."""
    position = 0
    while True:
        found = []
        with suppress(FileNotFoundError), path.open("rb") as file:
            file.seek(position)
            whole = file.read().rpartition(b"\n")[0]
            position += len(whole) + 1 if whole else 0
            for line in whole.splitlines():
                with suppress(ValueError, KeyError, TypeError, AttributeError):
                    values = json.loads(line)
                    found.append((int(values.pop("step")), values))
        yield found


def follow(run: Any, path: Path, end: End) -> int:
    """Log what a run writes until it is over, but not what wandb has of it already; returns the last step."""
    last = 0
    for lines in new_lines(path):
        over = end.come.is_set()  # asked first: what is written before the end is there at the next look
        for step, values in lines:
            if step >= max(run.starting_step, last):
                run.log(values, step=step)
            last = max(step, last)
        if over and not lines:
            return last
        end.come.wait(POLL)
    return last


def open_run(known: dict[str, Any], folder: Path, mode: str) -> tuple[Any, str]:
    """A wandb run and the mode that it has: offline also where online is not possible."""
    (folder / "wandb").mkdir(exist_ok=True)  # wandb itself would turn to a folder for temporary files
    import wandb

    settings = wandb.Settings(**{key: value for key, value in SETTINGS.items() if key in wandb.Settings.model_fields})
    arguments = names(known) | {"dir": folder, "settings": settings}
    _drop(folder, arguments["id"])
    if mode == "online":
        try:
            return wandb.init(**arguments, mode="online", resume="allow"), mode
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            log_line(f"{NOTE}not online ({reason}); this is an offline copy, which `wandb sync` sends")
            wandb.teardown()  # the service still holds the id
            _drop(folder, arguments["id"])
    return wandb.init(**arguments, mode="offline"), "offline"


def _drop(folder: Path, name: str) -> None:
    """Older copies of this run that nobody has sent: a new one holds all of it, and two would be sent twice."""
    for old in (folder / "wandb").glob(f"*run-*-{name}"):
        if not synced(old):
            shutil.rmtree(old, ignore_errors=True)


def send_result(run: Any, folder: Path, outcome: dict[str, Any], step: int) -> None:
    """The summary, the figures as a table, and the pictures in the run's folder."""
    import wandb

    metrics = {name: value for name, value in outcome.get("metrics", {}).items() if value is not None}
    shown: dict[str, Any] = {path.stem: wandb.Image(str(path)) for path in sorted(folder.iterdir()) if _is_picture(path)}
    if found := drawn(folder, outcome):
        shown["detections"] = [wandb.Image(str(path), caption=path.stem, boxes=boxes or None) for path, boxes in found]
    if metrics:
        shown["figures"] = wandb.Table(columns=["metric", "value"], data=[list(pair) for pair in metrics.items()])
    if shown:
        run.log(shown, step=max(step, run.starting_step))
    cost = {f"cost/{name}": value for name, value in outcome.get("cost", {}).items() if value is not None}
    run.summary.update({**metrics, **cost, "status": outcome["status"], "error": outcome.get("error")})


def _is_picture(path: Path) -> bool:
    return path.suffix in (".png", ".jpg") and not path.name.startswith(".")


def copy(known: dict[str, Any], folder: Path, mode: str, end: End) -> None:
    """Copy a run from its beginning, or from where wandb has it, to its end."""
    run, mode = open_run(known, folder, mode)
    place = os.path.relpath(Path(run.dir).parent, folder)
    state = {"id": run_id(known), "mode": mode, "folder": place, "step": 0, "complete": False}
    mark(folder, state)
    state["step"] = follow(run, folder / METRICS, end)
    outcome = {"status": "killed"} if end.killed else {"status": "no record"} | read_json(folder / RECORD)
    finished = outcome["status"] == "finished" and outcome.get("fingerprint") == known["fingerprint"]
    send_result(run, folder, outcome, state["step"])
    run.finish(exit_code=0 if finished else 1)
    mark(folder, {**state, "complete": finished})


def mark(folder: Path, state: dict[str, Any]) -> None:
    save_text(folder / MARKER, json.dumps(state, indent=1) + "\n")


def step_aside() -> None:
    """Let the training have the processor, and wait for an older copy of the same run that has not ended yet."""
    with suppress(OSError):
        os.nice(5)
        Path("/proc/self/autogroup").write_text("5")  # Linux weighs a session's processes against each other alone
    with suppress(OSError):
        fcntl.flock(1, fcntl.LOCK_EX)


def main(arguments: list[str]) -> int:
    folder, mode = Path(arguments[0]).resolve(), arguments[1]
    pipe = open(0, "rb", buffering=0, closefd=False)  # noqa: SIM115
    known = json.loads(pipe.readline())
    end = End(pipe)
    end.start()
    step_aside()
    os.environ.setdefault("WANDB_DATA_DIR", str(folder / "wandb"))  # tables too lie in the run's folder until they are sent
    try:
        copy(known, folder, mode, end)
    except BaseException as error:
        log_line(f"{FAILED}{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return 1
    return 0

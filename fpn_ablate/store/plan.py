"""The plan of a sweep: its runs, in a file that exists while the sweep does: `<out>/runs/.plans/<host>-<process>.json`.

The report's page shows a sweep's progress from it. No run depends on it.
"""

import json
import os
import socket
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from fpn_ablate.utils.files import save_text

PLANS = ".plans"
COMMAND = "FPN_ABLATE_COMMAND"  # environment variable: the command that the user typed, set for the jobs of a sweep
MAX_AGE = timedelta(days=7)  # a plan of another machine, whose processes cannot be checked, counts as active for this long


@dataclass(frozen=True)
class PlannedRun:
    table: str
    recipe: str
    data: str
    row: str
    seed: int
    steps: int


@dataclass(frozen=True)
class Plan:
    process: int
    born: str  # start time of the process, in the system's ticks: its number may be reused later
    host: str
    started: str
    code: str  # version of the core (engine.versions): results of another version are not this sweep's
    command: str
    cells: tuple[PlannedRun, ...]


def write_plan(runs: Path, planned: Iterable[PlannedRun], code: str = "") -> Path:
    """Write the plan of this process's sweep, and remove those of this machine's dead processes. Raises UserError, OSError."""
    folder, host = runs / PLANS, socket.gethostname()
    for file in folder.glob("*.json"):
        plan = _read(file)
        if plan and plan.host == host and not _is_active(plan):
            _remove(file)
    started = _now().isoformat(timespec="seconds")
    plan = Plan(os.getpid(), _start_time(os.getpid()), host, started, code, os.environ.get(COMMAND, ""), tuple(planned))
    file = plan_file(runs)
    save_text(file, json.dumps(asdict(plan)))
    return file


def active_plans(runs: Path, this_host: bool = False) -> list[Plan]:
    """Read the plans of running sweeps; with `this_host` only those of this machine, whose processes can be checked."""
    plans = [_read(file) for file in sorted((runs / PLANS).glob("*.json"))]
    return [plan for plan in plans if plan and _is_active(plan) and not (this_host and plan.host != socket.gethostname())]


def remove_plan(runs: Path) -> None:
    """Remove the plan of this process's sweep."""
    _remove(plan_file(runs))


def plan_file(runs: Path) -> Path:
    """Return the file of this process's sweep. With suffix `.stop` it is the one that `fpn_ablate.sweep.jobs` uses."""
    return runs / PLANS / f"{socket.gethostname()}-{os.getpid()}.json"


def _remove(file: Path) -> None:
    file.with_suffix(".stop").unlink(missing_ok=True)
    file.unlink(missing_ok=True)


def has_leftover_plan(runs: Path) -> bool:
    """Return whether this machine has a plan that nobody removed: its sweep is running, or was killed."""
    return any((runs / PLANS).glob(f"{socket.gethostname()}-*.json"))


def _read(file: Path) -> Plan | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return Plan(**content | {"cells": tuple(PlannedRun(**cell) for cell in content["cells"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_active(plan: Plan) -> bool:
    if plan.host != socket.gethostname():
        return _now() - datetime.fromisoformat(plan.started) < MAX_AGE
    try:
        os.kill(plan.process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # a process of another user
    return _start_time(plan.process) == plan.born


def _start_time(process: int) -> str:
    """Return a process's start time in ticks since boot; "" on systems without /proc."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]  # starttime


def _now() -> datetime:
    return datetime.now(UTC)

"""What a sweep is about to do, as a file that is there while it runs: `<out>/runs/.plans/<host>-<process>.json`.

The report's page shows from it how far the sweep is. Nothing of a run depends on it.
"""

import json
import os
import shutil
import socket
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from fpn_ablate.utils.files import save_text

FOLDER = ".plans"
COMMAND = "FPN_ABLATE_COMMAND"  # set by the command line for the jobs of a sweep: what the user typed
# A plan of another machine whose process cannot be asked for is over by then.
LONGEST = timedelta(days=7)


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
    born: str  # when the process began, as the system counts: another may have its number later
    host: str
    started: str
    code: str  # version of the core (runs.identity): figures of another are not this sweep's
    command: str
    cells: tuple[PlannedRun, ...]


def write_plan(runs: Path, cells: Iterable[PlannedRun], code: str = "") -> Path:
    """Leave word of a sweep, in place of the plans that this machine's dead processes have left. Raises UserError, OSError."""
    folder, host = runs / FOLDER, socket.gethostname()
    for file in folder.glob("*.json"):
        plan = _read(file)
        if plan and plan.host == host and not _is_active(plan):
            _remove(file)
    started = _now().isoformat(timespec="seconds")
    plan = Plan(os.getpid(), _born(os.getpid()), host, started, code, os.environ.get(COMMAND, ""), tuple(cells))
    file = plan_file(runs)
    save_text(file, json.dumps(asdict(plan)))
    return file


def active_plans(runs: Path, here: bool = False) -> list[Plan]:
    """The plans of sweeps that are under way below a folder of runs; `here`: on this machine, where it is known for sure."""
    found = [_read(file) for file in sorted((runs / FOLDER).glob("*.json"))]
    return [plan for plan in found if plan and _is_active(plan) and not (here and plan.host != socket.gethostname())]


def remove_plan(runs: Path) -> None:
    """This process's sweep is over, whatever ended it."""
    _remove(plan_file(runs))


def plan_file(runs: Path) -> Path:
    """The file of this process's sweep; with `.jobs` in place of `.json`, the folder of `fpn_ablate.sweep.jobs`."""
    return runs / FOLDER / f"{socket.gethostname()}-{os.getpid()}.json"


def _remove(file: Path) -> None:
    shutil.rmtree(file.with_suffix(".jobs"), ignore_errors=True)
    file.unlink(missing_ok=True)


def has_leftover_plan(runs: Path) -> bool:
    """Whether there is a plan of this machine that nobody took away: its sweep is under way, or was killed."""
    return any((runs / FOLDER).glob(f"{socket.gethostname()}-*.json"))


def _read(file: Path) -> Plan | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return Plan(**content | {"cells": tuple(PlannedRun(**cell) for cell in content["cells"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_active(plan: Plan) -> bool:
    if plan.host != socket.gethostname():
        return _now() - datetime.fromisoformat(plan.started) < LONGEST
    try:
        os.kill(plan.process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # of another user
    return _born(plan.process) == plan.born


def _born(process: int) -> str:
    """Empty where the system does not tell (it does on Linux)."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]  # starttime, in ticks since the machine started


def _now() -> datetime:
    return datetime.now(UTC)

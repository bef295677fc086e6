"""What a sweep is about to do, as a file that is there while it runs: `<out>/runs/.plans/<host>-<process>.json`.

The report's page shows from it how far the sweep is. Nothing of a run depends on it.
"""

import json
import os
import socket
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from fpn_ablate.files import write_atomically

FOLDER = ".plans"
COMMAND = "FPN_ABLATE_COMMAND"  # set by the command line for the jobs of a sweep: what the user typed
# A plan of another machine whose process cannot be asked for is over by then.
LONGEST = timedelta(days=7)


@dataclass(frozen=True)
class Cell:
    table: str
    recipe: str
    data: str
    row: str
    seed: int
    steps: int


@dataclass(frozen=True)
class Plan:
    process: int
    host: str
    started: str
    command: str
    cells: tuple[Cell, ...]


def write(runs: Path, cells: Iterable[Cell]) -> Path:
    """Leave word of a sweep, in place of the plans that this machine's dead processes have left. Raises UserError, OSError."""
    folder, host = runs / FOLDER, socket.gethostname()
    for file in folder.glob("*.json"):
        plan = _read(file)
        if plan and plan.host == host and not _is_active(plan):
            file.unlink(missing_ok=True)
    plan = Plan(os.getpid(), host, _now().isoformat(timespec="seconds"), os.environ.get(COMMAND, ""), tuple(cells))
    file = folder / f"{host}-{os.getpid()}.json"
    write_atomically(file, partial(Path.write_text, data=json.dumps(asdict(plan)), encoding="utf-8"))
    return file


def active(runs: Path) -> list[Plan]:
    """The plans of sweeps that are under way below a folder of runs."""
    found = [_read(file) for file in sorted((runs / FOLDER).glob("*.json"))]
    return [plan for plan in found if plan and _is_active(plan)]


def end(runs: Path) -> None:
    """This process's sweep is over, whatever ended it."""
    (runs / FOLDER / f"{socket.gethostname()}-{os.getpid()}.json").unlink(missing_ok=True)


def left(runs: Path) -> bool:
    """Whether there is a plan that nobody took away: its sweep is under way, or was killed."""
    return any((runs / FOLDER).glob("*.json"))


def _read(file: Path) -> Plan | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return Plan(**content | {"cells": tuple(Cell(**cell) for cell in content["cells"])})
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
    return True


def _now() -> datetime:
    return datetime.now(UTC)

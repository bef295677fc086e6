"""The plan of a sweep: its runs, in a file that exists while the sweep does: `<out>/runs/.plans/<host>-<process>.json`.

The sweep holds a lock beside it, which ends with the process however that ends. The report's page shows a sweep's progress from
its plan. No run depends on it.
"""

import json
import os
import socket
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from filelock import FileLock
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, with_config

from fpn_ablate.utils.console import COMMAND
from fpn_ablate.utils.files import save_text
from fpn_ablate.utils.locks import exclusive, is_free, lock

PLANS = ".plans"

_STRICT = ConfigDict(strict=True, extra="forbid")
_Count = Annotated[int, Field(ge=0, le=2**53)]


def _time_with_zone(text: str) -> str:
    if datetime.fromisoformat(text).utcoffset() is None:
        raise ValueError("a time without its zone")
    return text


@with_config(_STRICT)
@dataclass(frozen=True)
class PlannedRun:
    table: str
    recipe: str
    data: str
    row: str
    seed: _Count
    steps: _Count


@with_config(_STRICT)
@dataclass(frozen=True)
class Plan:
    started: Annotated[str, AfterValidator(_time_with_zone)]  # ISO
    code: str  # version of the core (engine.versions): results of another version are not this sweep's
    command: str
    cells: tuple[PlannedRun, ...]


_PLAN = TypeAdapter(Plan)
_held: dict[Path, FileLock] = {}  # locks of the plans of this process


def write_plan(runs: Path, planned: Iterable[PlannedRun], code: str = "") -> Path:
    """Write the plan of this process's sweep, and remove those of dead processes. Raises UserError, OSError."""
    file = plan_file(runs)
    for other in file.parent.glob("*.json"):
        if not _is_active(other):
            _remove(other)
    if file not in _held:
        file.parent.mkdir(parents=True, exist_ok=True)
        _held[file] = lock(file.with_suffix(".lock"))
        _held[file].acquire()
    plan = Plan(datetime.now(UTC).isoformat(timespec="seconds"), code, os.environ.get(COMMAND, ""), tuple(planned))
    save_text(file, json.dumps(asdict(plan)))
    return file


def active_plans(runs: Path, this_host: bool = False) -> list[Plan]:
    """Read the plans of running sweeps; with `this_host` only those of this machine."""
    files = sorted((runs / PLANS).glob(f"{socket.gethostname()}-*.json" if this_host else "*.json"))
    return [plan for file in files if (plan := _read(file)) and _is_active(file)]


def remove_plan(runs: Path) -> None:
    """Remove the plan of this process's sweep."""
    file = plan_file(runs)
    _remove(file)
    if file in _held:
        _held.pop(file).release()


def writing_tables(out: Path) -> AbstractContextManager[None]:
    """Hold the lock of the tables and the ledger in `out`: two that write at once would each lose the other's records."""
    return exclusive(out / "runs" / PLANS / ".locks" / "tables", f"the tables of {out}")


def plan_file(runs: Path) -> Path:
    """Return the file of this process's sweep. With suffix `.stop` it is the one that `fpn_ablate.sweep.jobs` uses."""
    return runs / PLANS / f"{socket.gethostname()}-{os.getpid()}.json"


def has_leftover_plan(runs: Path) -> bool:
    """Return whether this machine has a plan that nobody removed: its sweep is running, or was killed."""
    return any((runs / PLANS).glob(f"{socket.gethostname()}-*.json"))


def _read(file: Path) -> Plan | None:
    """Read a plan; None if the file is none, as each key's type and a time with its zone say."""
    try:
        return _PLAN.validate_json(file.read_bytes())
    except (OSError, ValueError):
        return None


def _is_active(file: Path) -> bool:
    """Return whether the process that wrote a plan is alive: it holds the plan's lock."""
    return not is_free(file.with_suffix(".lock"))


def _remove(file: Path) -> None:
    for suffix in (".stop", ".json", ".lock"):
        file.with_suffix(suffix).unlink(missing_ok=True)

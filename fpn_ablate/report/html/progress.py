"""Progress of running sweeps, from their plans (fpn_ablate.store.plan) and the records and metrics of their runs."""

import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fpn_ablate.report.collate import health
from fpn_ablate.report.collate.records import time_of
from fpn_ablate.report.collate.table import Table, clean
from fpn_ablate.report.html.curves import live_curves
from fpn_ablate.report.html.vega import Chart
from fpn_ablate.store import record as store
from fpn_ablate.store.plan import Plan, PlannedRun
from fpn_ablate.utils.console import coarse_duration
from fpn_ablate.utils.files import safe_name
from fpn_ablate.utils.locks import is_free
from fpn_ablate.utils.numbers import is_finite
from fpn_ablate.utils.paths import BACKBONES, CONFIG, METRICS, without_folders

MARKS = {"finished": "✓", "running": "▶", "waiting": "·", "failed": "✗"}
_Record = Mapping[str, Any]


@dataclass(frozen=True)
class State:
    """State of one run.

    Attributes:
        kind: a key of MARKS.
        share: the share of its steps that are done.
        left: seconds until its last step, at its own pace; inf if that is not known yet.
    """

    kind: str
    text: str
    detail: str = ""
    share: float = 0.0
    left: float = math.inf


@dataclass(frozen=True)
class Board:
    """States of a sweep's runs in one table: a line for each row, a column for each seed, None if the sweep has no such run."""

    title: str
    seeds: tuple[int, ...]
    rows: tuple[tuple[str, tuple[State | None, ...]], ...]


@dataclass(frozen=True)
class Progress:
    """Progress of the running sweeps. `notes`: what they do beside training runs."""

    boards: tuple[Board, ...]
    commands: tuple[str, ...]
    built: str
    time_left: str = ""
    notes: tuple[str, ...] = ()
    curves: Chart | None = None

    @property
    def states(self) -> list[State]:
        return [state for board in self.boards for _, states in board.rows for state in states if state]

    @property
    def done(self) -> float:
        """Number of runs that are done, with the shares of those that are running."""
        return sum(1.0 if state.kind in ("finished", "failed") else state.share for state in self.states)

    def count(self, *kinds: str) -> int:
        return sum(state.kind in (kinds or MARKS) for state in self.states)


def progress(plans: Collection[Plan], runs: Path, records: Iterable[_Record], tables: Iterable[Table]) -> Progress | None:
    """Compute the progress of the sweeps with these plans; None without a plan."""
    newest = {}
    for record in sorted(records, key=lambda r: str(r.get("finished") or "")):
        newest[tuple(record[key] for key in ("table", "recipe", "data", "row", "seed"))] = record
    by_key = {table.key: table for table in tables}
    boards, seconds_left, in_progress = [], [], {}
    for plan in plans:
        states, ended = {}, []
        for cell in plan.cells:
            table, record = by_key.get(_key(cell)), newest.get((*_key(cell), cell.row, cell.seed))
            if record is not None and time_of(record.get("finished")) >= time_of(plan.started):
                ended.append(time_of(record["finished"]))
                states[cell] = _ended(record, table)
            elif folder := _folder_in_progress(cell, plan, runs):
                states[cell] = _running(cell, folder)
                in_progress[folder] = cell
            elif record is not None and health.state(record) == "finished" and plan.code in ("", record.get("code")):
                states[cell] = _ended(record, table)
            else:
                states[cell] = State("waiting", "waiting")
        boards += [_board(key, states, by_key.get(key)) for key in dict.fromkeys(map(_key, plan.cells))]
        active = [state for state in states.values() if state.kind in ("running", "waiting")]
        seconds_left += [state.left for state in active if not ended or state.left < math.inf]
        if ended:  # the others at their pace, but never less than one of them needs
            pace = (max(ended) - time_of(plan.started)).total_seconds() / len(ended)
            seconds_left.append(pace * sum(1 - state.share for state in active))
    commands = tuple(dict.fromkeys(clean(without_folders(plan.command)) for plan in plans if plan.command))
    built = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    if not boards:
        return None
    longest = max(seconds_left, default=0.0)  # the sweeps run side by side
    time_left = coarse_duration(longest) if 0 < longest < math.inf else ""
    notes = tuple(_pretraining(runs.parent / BACKBONES))
    return Progress(tuple(boards), commands, built, time_left, notes, live_curves(_names(in_progress)))


def _names(in_progress: Mapping[Path, PlannedRun]) -> list[tuple[str, Path]]:
    """Name the runs in progress by row and seed, and those that share both by what else differs: table, data and recipe."""
    named = []
    for folder, cell in in_progress.items():
        twins = [other for other in in_progress.values() if (other.row, other.seed) == (cell.row, cell.seed)]
        differing = [key for key in ("table", "data", "recipe") if len({getattr(twin, key) for twin in twins}) > 1]
        parts = cell.row, f"seed {cell.seed}", *(getattr(cell, key) for key in differing)
        named.append((clean(", ".join(parts)), folder))
    return named


def _pretraining(folder: Path) -> Iterator[str]:
    """Yield a line for each pre-training in progress: one whose lock is held and whose weights are not there yet."""
    for lock_file in sorted(folder.glob("*.pt.lock")):
        weights = lock_file.with_name(lock_file.name.removesuffix(".lock"))
        if not weights.exists() and not is_free(lock_file):
            name = weights.stem.rpartition("-")[0]
            begun = max(file.stat().st_mtime for file in [lock_file, *folder.glob(f"{weights.stem}-checkpoint.pt")])
            yield clean(
                f"pre-training the backbone {name}, on which runs wait; last saved {coarse_duration(time.time() - begun)} ago"
            )


def _key(cell: PlannedRun) -> tuple[str, str, str]:
    return cell.table, cell.recipe, cell.data


def _board(key: tuple[str, str, str], states: Mapping[PlannedRun, State], table: Table | None) -> Board:
    by_cell = {(cell.row, cell.seed): state for cell, state in states.items() if _key(cell) == key}
    seeds = tuple(sorted({seed for _, seed in by_cell}))
    labels = {row.row: row.label for row in table.rows} if table else {}
    names = dict.fromkeys(row for row, _ in by_cell)
    rows = [(labels.get(row, clean(row)), tuple(by_cell.get((row, seed)) for seed in seeds)) for row in names]
    title = f"{table.definition.title if table else key[0]} · data {key[2]} · recipe {key[1]}"
    return Board(clean(title), seeds, tuple(rows))


def _ended(record: _Record, table: Table | None) -> State:
    """Return the state of a run that has ended, with its main metric."""
    if health.state(record) != "finished":
        return State("failed", health.state(record), str(health.reason(record) or ""))
    metric = table.main_metric if table else None
    value = metric.read(record) if metric else None
    return State("finished", "finished" if value is None else f"{metric.title} {value:.{metric.digits}f}")


def _folder_in_progress(cell: PlannedRun, plan: Plan, runs: Path) -> Path | None:
    """Return the newest folder of a run; None if none of it is newer than the plan."""
    folder = runs.joinpath(*(safe_name(part) for part in (cell.table, cell.recipe, cell.row)))
    begun = {file.stat().st_mtime: file.parent for file in folder.glob(f"seed{cell.seed}-*/{CONFIG}")}
    if not begun or max(begun) < time_of(plan.started).timestamp() - 1:
        return None
    return begun[max(begun)]


def _running(cell: PlannedRun, folder: Path) -> State:
    """Read the state of a run in progress from its metrics.jsonl."""
    metrics = folder / METRICS
    try:
        step = store.last_step(folder)
        spent = metrics.stat().st_mtime - (folder / CONFIG).stat().st_mtime  # since the run's start, or since it went on
        cost = (store.read(folder) or {}).get("cost")
        resumed_at = cost.get("resumed_at", 0) if isinstance(cost, dict) else 0
        done = step - (int(resumed_at) if is_finite(resumed_at) else 0)
    except (OSError, ValueError):
        return State("running", "starting")
    left = spent / done * max(cell.steps - step, 0) if done >= 1 else math.inf
    rest = "" if left == math.inf else f", {coarse_duration(left)} left" if step < cell.steps else ", evaluating"
    return State("running", f"step {step} of {cell.steps}{rest}", share=min(1.0, step / max(cell.steps, 1)), left=left)

"""Progress of running sweeps, from their plans (fpn_ablate.store.plan) and the records and metrics of their runs."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fpn_ablate.report.collate import health
from fpn_ablate.report.collate.records import time_of
from fpn_ablate.report.collate.table import Table
from fpn_ablate.store.plan import Plan
from fpn_ablate.utils.files import safe_name
from fpn_ablate.utils.paths import CONFIG, METRICS

MARKS = {"finished": "✓", "running": "▶", "waiting": "·", "failed": "✗"}


@dataclass(frozen=True)
class State:
    """State of one run: `kind` is a key of MARKS; `share` is the share of its steps that are done."""

    kind: str
    text: str
    detail: str = ""
    share: float = 0.0

    @property
    def mark(self) -> str:
        return MARKS[self.kind]


@dataclass(frozen=True)
class Board:
    """States of a sweep's runs in one table: a line for each row, a column for each seed, None if the sweep has no such run."""

    title: str
    seeds: tuple[int, ...]
    rows: tuple[tuple[str, tuple[State | None, ...]], ...]


@dataclass(frozen=True)
class Progress:
    boards: tuple[Board, ...]
    commands: tuple[str, ...]
    built: str
    time_left: str = ""

    def count(self, kind: str) -> int:
        return sum(state.kind == kind for board in self.boards for _, states in board.rows for state in states if state)

    @property
    def cells(self) -> int:
        return sum(self.count(kind) for kind in MARKS)


def progress(
    plans: Iterable[Plan], runs: Path, records: Iterable[Mapping[str, Any]], tables: Iterable[Table]
) -> Progress | None:
    """Compute the progress of the sweeps with these plans; None without a plan."""
    plans = list(plans)
    if not plans:
        return None
    newest = {}
    for record in sorted(records, key=lambda r: str(r.get("finished"))):
        newest[tuple(record[key] for key in ("table", "recipe", "data", "row", "seed"))] = record
    by_key = {table.key: table for table in tables}
    boards, times_left = [], []
    for plan in plans:
        states = {cell: _state(cell, plan, runs, newest, by_key) for cell in plan.cells}
        for key in dict.fromkeys((cell.table, cell.recipe, cell.data) for cell in plan.cells):
            boards.append(_board(key, {c: s for c, s in states.items() if (c.table, c.recipe, c.data) == key}, by_key.get(key)))
        times_left.append(_time_left(plan, newest, states.values()))
    commands = tuple(dict.fromkeys(plan.command for plan in plans if plan.command))
    return Progress(tuple(boards), commands, _now().strftime("%Y-%m-%d %H:%M:%S UTC"), ", ".join(filter(None, times_left)))


def _board(key: tuple[str, str, str], states: Mapping[Any, State], table: Table | None) -> Board:
    seeds = tuple(sorted({cell.seed for cell in states}))
    labels = {row.row: row.label for row in table.rows} if table else {}
    by_cell = {(cell.row, cell.seed): state for cell, state in states.items()}
    rows = dict.fromkeys(cell.row for cell in states)
    title = f"{table.definition.title if table else key[0]} · data {key[2]} · recipe {key[1]}"
    return Board(title, seeds, tuple((labels.get(r, r), tuple(by_cell.get((r, seed)) for seed in seeds)) for r in rows))


def _state(cell: Any, plan: Plan, runs: Path, newest: Mapping[tuple, Mapping[str, Any]], tables: Mapping) -> State:
    record = newest.get((cell.table, cell.recipe, cell.data, cell.row, cell.seed))
    ended_in_sweep = record is not None and time_of(record.get("finished")) >= time_of(plan.started)
    if not ended_in_sweep and (running := _running(cell, plan, runs)):
        return running
    if record is not None and health.state(record) == "finished" and (ended_in_sweep or plan.code in ("", record.get("code"))):
        return State("finished", _main_metric(cell, record, tables))
    if ended_in_sweep:
        return State("failed", health.state(record), str(health.reason(record) or ""))
    return State("waiting", "waiting")


def _main_metric(cell: Any, record: Mapping[str, Any], tables: Mapping) -> str:
    """Format the main metric of a finished run."""
    table = tables.get((cell.table, cell.recipe, cell.data))
    metric = next((m for m in table.definition.metrics if m.source is None), None) if table else None
    value = record.get(f"metrics.{metric.key}") if metric else None
    return f"{metric.title} {value * metric.scale:.{metric.digits}f}" if type(value) in (int, float) else "finished"


def _running(cell: Any, plan: Plan, runs: Path) -> State | None:
    """Read the state of a run in progress from its metrics.jsonl; None if no folder of it is newer than the plan."""
    parts = [safe_name(part) for part in (cell.table, cell.recipe, cell.row)]
    begun = time_of(plan.started).timestamp()
    folders = [f for f in runs.joinpath(*parts).glob(f"seed{cell.seed}-*") if (f / CONFIG).is_file()]
    folders = [folder for folder in folders if (folder / CONFIG).stat().st_mtime >= begun - 1]
    if not folders:
        return None
    folder = max(folders, key=lambda folder: (folder / CONFIG).stat().st_mtime)
    try:
        lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
        step = max(int(json.loads(line)["step"]) for line in lines[-2:] if line.endswith("}"))
        spent = (folder / METRICS).stat().st_mtime - (folder / CONFIG).stat().st_mtime
    except (OSError, ValueError, KeyError, TypeError):
        return State("running", "starting")
    rest = "" if step < 1 else f", {minutes(spent / step * (cell.steps - step))} left" if step < cell.steps else ", evaluating"
    return State("running", f"step {step} of {cell.steps}{rest}", share=min(1.0, step / max(cell.steps, 1)))


def _time_left(plan: Plan, newest: Mapping[tuple, Mapping[str, Any]], states: Iterable[State]) -> str:
    """Estimate the time left for the sweep from the pace of its runs that have ended."""
    records = [newest.get((cell.table, cell.recipe, cell.data, cell.row, cell.seed)) for cell in plan.cells]
    ended = [time_of(r.get("finished")) for r in records if r and time_of(r.get("finished")) >= time_of(plan.started)]
    rest = sum((1 - state.share) for state in states if state.kind in ("running", "waiting"))
    if not ended or not rest:
        return ""
    return minutes((max(ended) - time_of(plan.started)).total_seconds() / len(ended) * rest)


def minutes(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 0):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _now() -> datetime:
    return datetime.now(UTC)

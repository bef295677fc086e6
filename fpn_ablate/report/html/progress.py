"""How far sweeps are: their plans (fpn_ablate.store.plan), beside the records and the metrics of runs."""

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
from fpn_ablate.utils.paths import METRICS

MARKS = {"finished": "✓", "running": "▶", "waiting": "·", "failed": "✗"}


@dataclass(frozen=True)
class State:
    """One cell: `kind` is a key of MARKS, `text` what is shown below it."""

    kind: str
    text: str
    detail: str = ""
    share: float = 0.0

    @property
    def mark(self) -> str:
        return MARKS[self.kind]


@dataclass(frozen=True)
class Board:
    """The cells of one table in a sweep: rows downwards, seeds across; None where the sweep has no such cell."""

    title: str
    seeds: tuple[int, ...]
    rows: tuple[tuple[str, tuple[State | None, ...]], ...]


@dataclass(frozen=True)
class Progress:
    boards: tuple[Board, ...]
    commands: tuple[str, ...]
    built: str
    left: str = ""

    def count(self, kind: str) -> int:
        return sum(state.kind == kind for board in self.boards for _, states in board.rows for state in states if state)

    @property
    def cells(self) -> int:
        return sum(self.count(kind) for kind in MARKS)


def progress(
    plans: Iterable[Plan], runs: Path, records: Iterable[Mapping[str, Any]], tables: Iterable[Table]
) -> Progress | None:
    """None without a plan."""
    plans = list(plans)
    if not plans:
        return None
    places = {}
    for record in sorted(records, key=lambda r: str(r.get("finished"))):
        places[tuple(record[key] for key in ("table", "recipe", "data", "row", "seed"))] = record
    by_key = {table.key: table for table in tables}
    boards, left = [], []
    for plan in plans:
        states = {cell: _state(cell, plan, runs, places, by_key) for cell in plan.cells}
        for key in dict.fromkeys((cell.table, cell.recipe, cell.data) for cell in plan.cells):
            boards.append(_board(key, {c: s for c, s in states.items() if (c.table, c.recipe, c.data) == key}, by_key.get(key)))
        left.append(_left(plan, places, states.values()))
    commands = tuple(dict.fromkeys(plan.command for plan in plans if plan.command))
    return Progress(tuple(boards), commands, _now().strftime("%Y-%m-%d %H:%M:%S UTC"), ", ".join(filter(None, left)))


def _board(key: tuple[str, str, str], states: Mapping[Any, State], table: Table | None) -> Board:
    seeds = tuple(sorted({cell.seed for cell in states}))
    labels = {row.row: row.label for row in table.rows} if table else {}
    found = {(cell.row, cell.seed): state for cell, state in states.items()}
    rows = dict.fromkeys(cell.row for cell in states)
    title = f"{table.definition.title if table else key[0]} · data {key[2]} · recipe {key[1]}"
    return Board(title, seeds, tuple((labels.get(r, r), tuple(found.get((r, seed)) for seed in seeds)) for r in rows))


def _state(cell: Any, plan: Plan, runs: Path, places: Mapping[tuple, Mapping[str, Any]], tables: Mapping) -> State:
    record = places.get((cell.table, cell.recipe, cell.data, cell.row, cell.seed))
    ended_here = record is not None and time_of(record.get("finished")) >= time_of(plan.started)
    if not ended_here and (running := _running(cell, plan, runs)):
        return running
    if record is not None and health.state(record) == "finished" and (ended_here or plan.code in ("", record.get("code"))):
        return State("finished", _figure(cell, record, tables))
    if ended_here:
        return State("failed", health.state(record), str(health.reason(record) or ""))
    return State("waiting", "waiting")


def _figure(cell: Any, record: Mapping[str, Any], tables: Mapping) -> str:
    """The main metric of a finished run."""
    table = tables.get((cell.table, cell.recipe, cell.data))
    metric = next((m for m in table.definition.metrics if m.source is None), None) if table else None
    value = record.get(f"metrics.{metric.key}") if metric else None
    return f"{metric.title} {value * metric.scale:.{metric.digits}f}" if type(value) in (int, float) else "finished"


def _running(cell: Any, plan: Plan, runs: Path) -> State | None:
    """From the newest metrics.jsonl in a folder of this cell that is younger than the plan."""
    parts = [safe_name(part) for part in (cell.table, cell.recipe, cell.row)]
    begun = time_of(plan.started).timestamp()
    folders = [f for f in runs.joinpath(*parts).glob(f"seed{cell.seed}-*") if (f / "config.yaml").is_file()]
    folders = [folder for folder in folders if (folder / "config.yaml").stat().st_mtime >= begun - 1]
    if not folders:
        return None
    folder = max(folders, key=lambda folder: (folder / "config.yaml").stat().st_mtime)
    try:
        lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
        step = max(int(json.loads(line)["step"]) for line in lines[-2:] if line.endswith("}"))
        spent = (folder / METRICS).stat().st_mtime - (folder / "config.yaml").stat().st_mtime
    except (OSError, ValueError, KeyError, TypeError):
        return State("running", "starting")
    left = "" if step < 1 else f", {minutes(spent / step * (cell.steps - step))} left" if step < cell.steps else ", evaluating"
    return State("running", f"step {step} of {cell.steps}{left}", share=min(1.0, step / max(cell.steps, 1)))


def _left(plan: Plan, places: Mapping[tuple, Mapping[str, Any]], states: Iterable[State]) -> str:
    """Time left for the sweep, at the pace of the cells that it has ended."""
    wanted = [places.get((cell.table, cell.recipe, cell.data, cell.row, cell.seed)) for cell in plan.cells]
    ended = [time_of(r.get("finished")) for r in wanted if r and time_of(r.get("finished")) >= time_of(plan.started)]
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

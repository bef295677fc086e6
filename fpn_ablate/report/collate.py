"""From records to tables: which records stand in one table, and what each cell says."""

import hashlib
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from fpn_ablate.errors import UserError
from fpn_ablate.paths import EXPERIMENTS
from fpn_ablate.report import choose, footer
from fpn_ablate.report.definition import Definition, Effect, Metric, RowSpec, find
from fpn_ablate.report.stats import Summary, summarise

Record = dict[str, Any]  # one record, flat, with dots in its keys
Key = tuple[str, str, str]  # table, recipe, data
SOURCES = "sources"  # no table: what other cells learned from. Its records stand in the ledger


@dataclass(frozen=True)
class Cell:
    """One metric of one row. Values in the table's unit (percent); only finished seeds are in `values`."""

    values: dict[int, float | None]
    published: float | None

    @cached_property
    def ours(self) -> Summary:
        return summarise(self.values.values())

    @property
    def difference(self) -> float | None:
        """Ours minus published."""
        return None if self.ours.mean is None or self.published is None else self.ours.mean - self.published


@dataclass(frozen=True)
class Row:
    """One row with a cell for each metric; `states` holds the status of every seed that has a record."""

    row: str
    label: str
    letter: str | None
    facts: dict[str, Any]
    published: dict[str, Any]
    cells: dict[str, Cell]
    states: dict[int, str]
    errors: dict[int, str]
    published_only: bool = False

    @property
    def seeds(self) -> tuple[int, ...]:
        """Finished seeds."""
        return tuple(seed for seed, state in self.states.items() if state == "finished")

    @property
    def state(self) -> str:
        """`finished` if any seed is, `not run` without a record, else what became of the seeds (`failed` if mixed)."""
        if self.published_only:
            return "published only"
        if self.seeds:
            return "finished"
        found = set(self.states.values()) or {"not run"}
        return found.pop() if len(found) == 1 else "failed"


@dataclass(frozen=True)
class Difference:
    """An effect of the definition, with a cell for each metric over the seeds that all its rows have finished."""

    title: str
    seeds: tuple[int, ...]
    cells: dict[str, Cell]


@dataclass(frozen=True)
class Table:
    """One table: the rows of a definition, filled with the records of one setting."""

    recipe: str
    data: str
    generated: bool
    same_data: bool  # as the paper's
    setting: str
    definition: Definition
    rows: tuple[Row, ...]
    effects: tuple[Difference, ...]
    footer: tuple[tuple[str, str], ...]

    @property
    def key(self) -> Key:
        return self.definition.table, self.recipe, self.data

    @property
    def name(self) -> str:
        return file_name(self.key)

    @property
    def published(self) -> bool:
        return any(cell.published is not None for row in self.rows for cell in row.cells.values())


def collate(
    frame: pd.DataFrame,
    only: Collection[Key] | None = None,
    experiments: Iterable[Path] = (EXPERIMENTS,),
    settings: Collection[str] | None = None,
    errors: list[str] | None = None,
) -> list[Table]:
    """Tables of all records (not of sources), or of those (table, recipe, data) in `only`; one for each, of its newest setting.

    A table that has records of one of `settings` is made of these instead. `errors` collects why a table cannot be made, so
    that the others are; without it the first such reason is raised.

    Raises:
        UserError: a definition is wrong, two tables share a file name, or `settings` puts rows together that cannot be.
    """
    groups: dict[Key, list[Record]] = {}
    for record in frame[frame["table"] != SOURCES].to_dict("records"):
        groups.setdefault((record["table"], record["recipe"], record["data"]), []).append(record)
    chosen = [key for key in sorted(groups) if only is None or key in only]
    names = [file_name(key) for key in chosen]
    unreadable = frame.attrs.get("unreadable", [])
    tables: list[Table] = []
    for key, name in zip(chosen, names, strict=True):
        try:
            if names.count(name) > 1:
                raise UserError(f"two tables would be written to the one file name '{name}', one of them {key}; rename one")
            tables.append(_table(key, groups[key], unreadable, list(experiments), settings))
        except UserError as error:
            if errors is None:
                raise
            if str(error) not in errors:  # a wrong definition is in the way of many tables
                errors.append(str(error))
    return tables


def file_name(key: Key) -> str:
    """`<table>-<data>-<recipe>` in harmless characters, at most 100; a hash keeps altered names apart."""
    table, recipe, data = key
    raw = "-".join((table, data, recipe))
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", raw).strip(".")
    if safe == raw and len(raw) <= 100:
        return raw
    return f"{safe[:91]}-{hashlib.sha256(repr(key).encode()).hexdigest()[:8]}"


def _table(
    key: Key, records: list[Record], unreadable: list[str], experiments: list[Path], settings: Collection[str] | None
) -> Table:
    ours, others = choose.one_setting(records, settings)
    definition = find(key[0], _metrics(ours), experiments)
    ours, left_out = choose.one_record_a_seed(ours, {name for spec in definition.rows for name in spec.names})
    rows = _rows(definition, ours)
    table, recipe, data = key
    return Table(
        recipe=recipe,
        data=data,
        generated=any(record["generated"] for record in ours),
        same_data=_same_data(definition, data, ours),
        setting=ours[0]["setting"],
        definition=definition,
        rows=rows,
        effects=_effects(definition, rows),
        footer=tuple(footer.lines(definition, rows, ours, others, left_out, _of_table(unreadable, table))),
    )


def _same_data(definition: Definition, data: str, records: list[Record]) -> bool:
    paper = definition.paper
    if paper is None or any(record["generated"] for record in records):
        return False
    counts = {record.get("images.count") for record in records if record["status"] == "finished"}
    return data.casefold() in paper.same_names and (paper.same_images is None or counts == {paper.same_images})


def _rows(definition: Definition, records: list[Record]) -> tuple[Row, ...]:
    by_row: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda r: (r["row"], r["seed"])):
        by_row.setdefault(record["row"], []).append(record)
    names = [_name(spec, by_row) for spec in definition.rows]
    own = [name for name in by_row if name not in names]
    specs = (*definition.rows, *(RowSpec((name,), name) for name in own))
    pairs = zip(specs, (*names, *own), strict=True)
    return tuple(_row(spec, name, [] if spec.published_only else by_row.get(name, []), definition) for spec, name in pairs)


def _name(spec: RowSpec, found: Collection[str]) -> str:
    """The name under which a promised row stands."""
    if spec.published_only:
        return f"{spec.names[0]} (published only)"  # a row of ours that happens to have its name is shown below
    return next((name for name in spec.names if name in found), spec.names[0])


def _row(spec: RowSpec, name: str, records: list[Record], definition: Definition) -> Row:
    finished = [record for record in records if record["status"] == "finished"]
    return Row(
        row=name,
        label=spec.label,
        letter=spec.letter,
        facts={fact.key: _fact(fact.source, records, spec.published.get(fact.key)) for fact in definition.facts},
        published=spec.published,
        cells={metric.key: _cell(metric, finished, spec) for metric in definition.metrics},
        states={record["seed"]: record["status"] for record in records},
        errors={record["seed"]: str(record["error"]) for record in records if record.get("error")},
        published_only=spec.published_only,
    )


def _effects(definition: Definition, rows: tuple[Row, ...]) -> tuple[Difference, ...]:
    pairs = {spec.names[0]: (spec, row) for spec, row in zip(definition.rows, rows, strict=False)}
    return tuple(_difference(effect, pairs, definition) for effect in definition.effects)


def _difference(effect: Effect, pairs: dict[str, tuple[RowSpec, Row]], definition: Definition) -> Difference:
    """No seeds where the rows have none in common, or stand for different ones of their names (of another backbone, say)."""
    chosen = [pairs[name] for name in (*effect.plus, *effect.minus)]
    names = {spec.names.index(row.row) for spec, row in chosen if len(spec.names) > 1}
    seeds = sorted(set.intersection(*(set(row.seeds) for _, row in chosen))) if len(names) < 2 else []

    def value(seed: int, key: str) -> float | None:
        values = [row.cells[key].values[seed] for _, row in chosen]
        plus, minus = values[: len(effect.plus)], values[len(effect.plus) :]
        return None if None in values else effect.scale * (fmean(plus) - fmean(minus))

    # A cost is no effect: how long a row takes differs from run to run, and with what else the machine has to do.
    own = {metric.key: seeds if metric.source is None else [] for metric in definition.metrics}
    cells = {key: Cell({seed: value(seed, key) for seed in own[key]}, None) for key in own}
    return Difference(effect.title, tuple(seeds), cells)


def _fact(source: str, records: list[Record], published: Any) -> Any:
    """What the records say; where there is none, what the definition says of the row."""
    found = [value for record in records if (value := _described(record, source)) is not None]
    if any(value != found[0] for value in found):
        return " / ".join(sorted({str(value) for value in found}))
    return found[0] if found else published


def _described(record: Record, source: str) -> Any:
    """What a record says under the key `source`, or, one beside the other, under several: `verify.gflops_neck + ...`."""
    values = [record.get(key) for key in source.split(" + ")]
    if len(values) == 1 or None in values:
        return values[0] if len(values) == 1 else None
    return " + ".join(f"{value:.1f}" if isinstance(value, float) else str(value) for value in values)


def _cell(metric: Metric, finished: list[Record], spec: RowSpec) -> Cell:
    values = {record["seed"]: record.get(metric.source or f"metrics.{metric.key}") for record in finished}
    scaled = {seed: value * metric.scale if type(value) in (int, float) else None for seed, value in values.items()}
    return Cell(scaled, spec.published.get(metric.key))


def _metrics(records: list[Record]) -> set[str]:
    """Metrics that are defined in any record, and their sizes, which may be undefined in all of them."""
    metrics = {key: key.removeprefix("metrics.") for key in records[0] if key.startswith("metrics.")}
    defined = {name for key, name in metrics.items() if any(record[key] is not None for record in records)}
    bases = {name.partition("_")[0] for name in defined}
    return {name for name in metrics.values() if name in defined or name.partition("_")[0] in bases}


def _of_table(unreadable: list[str], table: str) -> list[str]:
    """Files of a run's folder belong to the table that the folder names; others might belong to any."""
    return [item for item in unreadable if table in (parts := item.split(": ")[0].split("/")) or len(parts) < 5]

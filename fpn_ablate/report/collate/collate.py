"""From records to tables: which records stand in one table, and what each cell says."""

from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fpn_ablate.report.collate import choose, footer, health
from fpn_ablate.report.collate.cells import Cell, Contrast
from fpn_ablate.report.collate.claims import judge
from fpn_ablate.report.collate.claims import load as load_claims
from fpn_ablate.report.collate.compare import Comparison
from fpn_ablate.report.collate.definition import Definition, Effect, Metric, RowSpec, find
from fpn_ablate.report.collate.table import (
    SOURCES,
    Claim,
    Difference,
    Key,
    Record,
    Replicates,
    Row,
    Table,
    file_name,
)
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.paths import EXPERIMENTS


def collate(
    frame: pd.DataFrame,
    only: Collection[Key] | None = None,
    experiments: Iterable[Path] = (EXPERIMENTS,),
    settings: Collection[str] | None = None,
    errors: list[str] | None = None,
    allow_unfair: bool = False,
) -> list[Table]:
    """Tables of all records (not of sources), or of those (table, recipe, data) in `only`; one for each, of its newest setting.

    A table that has records of one of `settings` is made of these instead. `errors` collects why a table cannot be made, so
    that the others are; without it the first such reason is raised. `allow_unfair` puts the records of all settings into one
    table, and names in its footer what they differ in.

    Raises:
        UserError: a definition is wrong, two tables share a file name, or `settings` puts rows together that cannot be.
    """
    groups: dict[Key, list[Record]] = {}
    for record in frame[frame["table"] != SOURCES].to_dict("records"):
        groups.setdefault((record["table"], record["recipe"], record["data"]), []).append(record)
    chosen = [key for key in sorted(groups) if only is None or key in only]
    names = [file_name(key) for key in chosen]
    tables: list[Table] = []
    folders = list(experiments)
    try:
        claims = load_claims(folders)
    except UserError as error:
        if errors is None:
            raise
        errors.append(str(error))
        claims = []
    for key, name in zip(chosen, names, strict=True):
        try:
            if names.count(name) > 1:
                raise UserError(f"two tables would be written to the one file name '{name}', one of them {key}; rename one")
            tables.append(_table(key, groups[key], frame.attrs, folders, settings, claims, allow_unfair))
        except UserError as error:
            if errors is None:
                raise
            if str(error) not in errors:  # a wrong definition is in the way of many tables
                errors.append(str(error))
    return tables


def _table(
    key: Key,
    records: list[Record],
    attrs: Mapping[str, Any],
    experiments: list[Path],
    settings: Collection[str] | None,
    claims: list[Claim],
    allow_unfair: bool,
) -> Table:
    ours, others = choose.one_setting(records, settings, allow_unfair)
    unfair = allow_unfair and bool(others)
    definition = find(key[0], _metrics(ours), experiments)
    strangers = {id(record) for other in others for record in other}
    compared = [record for record in ours if id(record) not in strangers]
    ours, left_out = choose.one_record_a_seed(ours, {name for spec in definition.rows for name in spec.names})
    ours, again = _control(definition, ours)
    context = _comparable(attrs.get("replicates", {}), [*ours, *again]), attrs.get("folders", {})
    rows = _rows(definition, ours, *context)
    promised = {spec.names[0]: row for spec, row in zip(definition.rows, rows, strict=False) if not row.published_only}
    comparison = Comparison(definition, promised, _control_row(definition, again, *context))
    every = Comparison(definition, {row.row: row for row in rows if not row.published_only})
    effects = tuple(_difference(effect, comparison) for effect in definition.effects)
    verdicts = () if unfair else judge(claims, comparison)
    contrasts = [*(v.found for v in verdicts if v.found), *(cell for effect in effects for cell in effect.cells.values())]
    notes = footer.comparison(definition, contrasts, comparison.control, comparison.noise())
    table, recipe, data = key
    unreadable = _of_table(attrs.get("unreadable", []), table)
    return Table(
        recipe=recipe,
        data=data,
        generated=any(record["generated"] for record in ours),
        same_data=_same_data(definition, data, ours),
        setting=ours[0]["setting"],
        definition=definition,
        rows=rows,
        effects=effects,
        footer=tuple(footer.lines(definition, rows, compared, others, left_out, unreadable, notes, unfair)),
        verdicts=verdicts,
        control=comparison.control,
        best=frozenset() if unfair else every.best(),
        unfair=unfair,
    )


def _comparable(replicates: Replicates, records: list[Record]) -> Replicates:
    """The replicates of these records on the same draws: the most common ones, cut to the shortest (draws begin alike)."""
    found: dict[str, dict[str, Mapping[str, np.ndarray]]] = {}
    for record in records:
        with suppress(KeyError):  # a run of an earlier version, or one whose disk was full
            found.setdefault(str(record.get("draws")), {})[record["fingerprint"]] = replicates[record["fingerprint"]]
    common = max(found.values(), key=len, default={})
    shortest = min((len(values) for run in common.values() for values in run.values()), default=0)
    return {name: {metric: values[:shortest] for metric, values in run.items()} for name, run in common.items()}


def _control(definition: Definition, records: list[Record]) -> tuple[list[Record], list[Record]]:
    """The records of the rows, and those of the A/A control: of its row and its seeds, where no other row has these."""
    control = definition.control
    if control is None:
        return records, []
    spec = next(spec for spec in definition.rows if spec.names[0] == control.row)
    elsewhere = {r["seed"] for r in records if r["row"] not in spec.names and health.state(r) == "finished"}
    seeds = set(control.seeds) - elsewhere
    again = [record for record in records if record["row"] in spec.names and record["seed"] in seeds]
    again.sort(key=lambda record: record["seed"])
    rest = [record for record in records if not (record["row"] in spec.names and record["seed"] in seeds)]
    return (rest, again) if rest else (records, [])


def _control_row(
    definition: Definition, again: list[Record], replicates: Replicates, folders: Mapping[tuple[str, str], Path]
) -> Row | None:
    if not again:
        return None
    spec = next(spec for spec in definition.rows if spec.names[0] == definition.control.row)
    label = f"{spec.label} again, other seeds (A/A control)"
    return _row(RowSpec(spec.names, label), again[-1]["row"], again, definition, replicates, folders)


def _same_data(definition: Definition, data: str, records: list[Record]) -> bool:
    paper = definition.paper
    if paper is None or any(record["generated"] for record in records):
        return False
    counts = {record.get("images.count") for record in records if record["status"] == "finished"}
    return data.casefold() in paper.same_names and (paper.same_images is None or counts == {paper.same_images})


def _rows(
    definition: Definition, records: list[Record], replicates: Replicates, folders: Mapping[tuple[str, str], Path]
) -> tuple[Row, ...]:
    by_row: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda r: (r["row"], r["seed"])):
        by_row.setdefault(record["row"], []).append(record)
    names = [_name(spec, by_row) for spec in definition.rows]
    own = [name for name in by_row if name not in names]
    specs = (*definition.rows, *(RowSpec((name,), name) for name in own))
    pairs = zip(specs, (*names, *own), strict=True)
    return tuple(
        _row(spec, name, [] if spec.published_only else by_row.get(name, []), definition, replicates, folders)
        for spec, name in pairs
    )


def _name(spec: RowSpec, found: Collection[str]) -> str:
    """The name under which a promised row stands."""
    if spec.published_only:
        return f"{spec.names[0]} (published only)"  # a row of ours that happens to have its name is shown below
    return next((name for name in spec.names if name in found), spec.names[0])


def _row(
    spec: RowSpec,
    name: str,
    records: list[Record],
    definition: Definition,
    replicates: Replicates,
    folders: Mapping[tuple[str, str], Path],
) -> Row:
    healthy = [record for record in records if health.state(record) == "finished"]
    return Row(
        row=name,
        label=spec.label,
        letter=spec.letter,
        facts={fact.key: _fact(fact.source, records, spec.published.get(fact.key)) for fact in definition.facts},
        published=spec.published,
        cells={metric.key: _cell(metric, healthy, spec, replicates) for metric in definition.metrics},
        states={record["seed"]: health.state(record) for record in records},
        errors={record["seed"]: why for record in records if (why := health.reason(record))},
        folders={r["seed"]: folders[place] for r in records if (place := (r["table"], r["fingerprint"])) in folders},
        records=tuple(records),
        published_only=spec.published_only,
    )


def _difference(effect: Effect, comparison: Comparison) -> Difference:
    def cell(metric: Metric) -> Contrast:
        if metric.source is not None:  # how long a row takes differs from run to run: a cost is no effect
            return Contrast({})
        return comparison.contrast(metric.key, effect.plus, effect.minus, effect.scale)

    seeds = comparison.seeds([*effect.plus, *effect.minus])
    return Difference(effect.title, tuple(seeds), {metric.key: cell(metric) for metric in comparison.definition.metrics})


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


def _cell(metric: Metric, finished: list[Record], spec: RowSpec, replicates: Replicates) -> Cell:
    values = {record["seed"]: record.get(metric.source or f"metrics.{metric.key}") for record in finished}
    scaled = {seed: value * metric.scale if type(value) in (int, float) else None for seed, value in values.items()}
    drawn = {} if metric.source else _resampled(metric, finished, replicates)
    return Cell(scaled, spec.published.get(metric.key), drawn)


def _resampled(metric: Metric, finished: list[Record], replicates: Replicates) -> dict[int, np.ndarray]:
    drawn = {record["seed"]: replicates.get(record["fingerprint"], {}).get(metric.key) for record in finished}
    return {seed: values * metric.scale for seed, values in drawn.items() if values is not None}


def _metrics(records: list[Record]) -> set[str]:
    """Metrics that are defined in any record, and their sizes, which may be undefined in all of them."""
    metrics = {key: key.removeprefix("metrics.") for key in records[0] if key.startswith("metrics.")}
    defined = {name for key, name in metrics.items() if any(record[key] is not None for record in records)}
    bases = {name.partition("_")[0] for name in defined}
    return {name for name in metrics.values() if name in defined or name.partition("_")[0] in bases}


def _of_table(unreadable: list[str], table: str) -> list[str]:
    """Files of a run's folder belong to the table that the folder names; others might belong to any."""
    return [item for item in unreadable if table in (parts := item.split(": ")[0].split("/")) or len(parts) < 5]

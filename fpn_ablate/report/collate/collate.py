"""Collate records into tables: choose each table's records and fill its cells."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fpn_ablate.config.sources import SOURCES
from fpn_ablate.report.collate import choose, footer, health
from fpn_ablate.report.collate.cells import Cell, Contrast
from fpn_ablate.report.collate.claims import judge, load_claims
from fpn_ablate.report.collate.compare import Comparison
from fpn_ablate.report.collate.definition import BASELINE, Definition, Effect, Metric, RowSpec, find_definition
from fpn_ablate.report.collate.stats import holm
from fpn_ablate.report.collate.table import Claim, EffectRow, Key, Record, Row, Table, file_name
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.paths import EXPERIMENTS

Replicates = Mapping[str, Mapping[str, np.ndarray]]  # {fingerprint: {metric: (B,) fractions}}


def collate(
    frame: pd.DataFrame,
    only: Collection[Key] | None = None,
    experiments: Iterable[Path] = (EXPERIMENTS,),
    settings: Collection[str] | None = None,
    errors: list[str] | None = None,
    allow_unfair: bool = False,
) -> list[Table]:
    """Make one table for each (table, recipe, data) of the records, from its newest setting.

    Args:
        only: limits the tables to these keys. SOURCES never becomes a table.
        settings: a table that has records of one of these settings uses them instead of the newest.
        errors: collects why a table cannot be made, and the other tables are made; without it the first reason is raised.
        allow_unfair: puts the records of all settings into one table, whose footer names their differences.

    Raises:
        UserError: a definition is wrong, two tables share a file name, or `settings` puts rows together that cannot be
            compared.
    """
    groups: dict[Key, list[Record]] = {}
    for record in frame[frame["table"] != SOURCES].to_dict("records"):
        groups.setdefault((record["table"], record["recipe"], record["data"]), []).append(record)
    chosen = [key for key in sorted(groups) if only is None or key in only]
    names = [file_name(key) for key in chosen]
    tables: list[Table] = []
    # Each folder once, or its claims would be judged twice and corrected for twice as many.
    folders, claims = list(dict.fromkeys(folder.resolve() for folder in experiments)), []
    with _collected(errors):
        claims = load_claims(folders)
    for key, name in zip(chosen, names, strict=True):
        with _collected(errors):
            if names.count(name) > 1:
                raise UserError(f"two tables have the same file name '{name}', one of them {key}; rename one")
            tables.append(_table(key, groups[key], frame.attrs, folders, settings, claims, allow_unfair))
    return tables


@contextmanager
def _collected(errors: list[str] | None) -> Iterator[None]:
    """Append a UserError to `errors`, once: a wrong definition affects many tables. Without the list it is raised."""
    try:
        yield
    except UserError as error:
        if errors is None:
            raise
        errors += [str(error)] if str(error) not in errors else []


def _table(
    key: Key,
    records: list[Record],
    attrs: Mapping[str, Any],
    experiments: list[Path],
    settings: Collection[str] | None,
    claims: list[Claim],
    allow_unfair: bool,
) -> Table:
    of_setting, others = choose.select_setting(records, settings, allow_unfair)
    unfair = allow_unfair and bool(others)
    records, other_code = (records, []) if unfair else choose.select_code(of_setting)
    definition = find_definition(key[0], _metrics(records if unfair else of_setting), experiments)
    records, left_out = choose.select_records(records, {name: spec.names[0] for spec in definition.rows for name in spec.names})
    records, control_records = _split_off_control(definition, records)
    replicates = _on_common_draws(attrs.get("replicates", {}), [*records, *control_records])
    make_row = partial(_row, definition=definition, replicates=replicates, folders=attrs.get("folders", {}))
    rows = tuple(make_row(*arguments) for arguments in _records_by_row(definition, records))
    defined = {spec.names[0]: row for spec, row in zip(definition.rows, rows, strict=False) if not row.published_only}
    control = None
    if control_records:
        label = f"{defined[definition.control.row].label} again, other seeds (A/A control)"
        control = make_row(RowSpec(names=(definition.control.row,), label=label), control_records[-1]["row"], control_records)
    own = {row.row: row for row in rows[len(definition.rows) :]}
    comparison = Comparison(definition, defined | own, control)
    effects = _effects(comparison, unfair)
    verdicts = () if unfair else judge(claims, comparison)
    contrasts = [v.contrast for v in verdicts if v.contrast]
    contrasts += [cell for effect in effects if not effect.row for cell in effect.cells.values()]
    notes = footer.comparison_lines(definition, contrasts, control, comparison.noise())
    tested = any(p is not None for effect in effects for p in effect.p.values())
    how = (footer.EFFECTS if effects else "") + (footer.DIFFERENCES if tested else "")
    notes += footer.looks_lines(definition, tested or any(v.look and not v.reason for v in verdicts))
    table, recipe, data = key
    unreadable = _unreadable_of(table, attrs.get("unreadable", []))
    return Table(
        recipe=recipe,
        data=data,
        generated=any(record["generated"] for record in records),
        same_data=_same_data(definition, data, records),
        setting=records[0]["setting"],
        definition=definition,
        rows=rows,
        effects=effects,
        footer=tuple(
            footer.lines(definition, rows, of_setting, others, [*other_code, *left_out], unreadable, notes, unfair, how)
        ),
        verdicts=verdicts,
        control=control,
        best=frozenset() if unfair else comparison.best(),
        unfair=unfair,
    )


def _on_common_draws(replicates: Replicates, records: list[Record]) -> Replicates:
    """Return the replicates of the records that share the most common bootstrap draws, cut to the shortest.

    Cutting keeps them comparable, since longer series begin with the same draws.
    """
    by_draws: dict[str, dict[str, Mapping[str, np.ndarray]]] = {}
    for record in records:
        with suppress(KeyError):  # a run of an earlier version, or one whose disk was full
            by_draws.setdefault(str(record.get("draws")), {})[record["fingerprint"]] = replicates[record["fingerprint"]]
    common = max(by_draws.values(), key=len, default={})
    shortest = min((len(values) for run in common.values() for values in run.values()), default=0)
    return {name: {metric: values[:shortest] for metric, values in run.items()} for name, run in common.items()}


def _split_off_control(definition: Definition, records: list[Record]) -> tuple[list[Record], list[Record]]:
    """Return the records of the rows and those of the A/A control: of its row, with its seeds if no other row has them."""
    control = definition.control
    if control is None:
        return records, []
    spec = next(spec for spec in definition.rows if spec.names[0] == control.row)
    elsewhere = {r["seed"] for r in records if r["row"] not in spec.names and health.state(r) == "finished"}
    seeds = set(control.seeds) - elsewhere
    of_control = [record for record in records if record["row"] in spec.names and record["seed"] in seeds]
    of_control.sort(key=lambda record: record["seed"])
    rest = [record for record in records if not (record["row"] in spec.names and record["seed"] in seeds)]
    return (rest, of_control) if rest else (records, [])


def _same_data(definition: Definition, data: str, records: list[Record]) -> bool:
    paper = definition.paper
    if paper is None or any(record["generated"] for record in records):
        return False
    names, images = {name.casefold() for name in paper.same_data.names}, paper.same_data.images
    counts = {record.get("images.count") for record in records if record["status"] == "finished"}
    return data.casefold() in names and (images is None or counts == {images})


def _records_by_row(definition: Definition, records: list[Record]) -> list[tuple[RowSpec, str, list[Record]]]:
    """Return each row of the definition, then those that it does not list: (row, the name that is shown, its records)."""
    by_row: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda r: (r["row"], r["seed"])):
        by_row.setdefault(record["row"], []).append(record)
    rows = []
    for spec in definition.rows:
        if spec.published_only:  # a row of ours with the same name is shown below
            rows.append((spec, f"{spec.names[0]} (published only)", []))
        else:
            name = next((name for name in spec.names if name in by_row), spec.names[0])
            rows.append((spec, name, by_row.pop(name, [])))
    return rows + [(RowSpec(names=(name,)), name, own) for name, own in by_row.items()]


def _row(
    spec: RowSpec,
    name: str,
    records: list[Record],
    definition: Definition,
    replicates: Replicates,
    folders: Mapping[tuple[str, str], Path],
) -> Row:
    healthy = [record for record in records if health.state(record) == "finished"]
    shown = healthy or [record for record in records if health.state(record) == "unhealthy"]
    return Row(
        row=name,
        label=spec.label,
        letter=spec.letter,
        facts={fact.key: _fact_value(fact.source, records, spec.published.get(fact.key)) for fact in definition.facts},
        published=spec.published,
        cells={metric.key: _cell(metric, shown, spec, replicates) for metric in definition.metrics},
        states={record["seed"]: health.state(record) for record in records},
        errors={record["seed"]: reason for record in records if (reason := health.reason(record))},
        folders={r["seed"]: folders[place] for r in records if (place := (r["table"], r["fingerprint"])) in folders},
        records=tuple(records),
        published_only=spec.published_only,
    )


def _effects(comparison: Comparison, unfair: bool) -> tuple[EffectRow, ...]:
    """Return the definition's effects, and the difference of each row from the baseline where none of them is that."""
    definition, rows = comparison.definition, comparison.rows
    effects, differences = dict.fromkeys(definition.effects), []
    baseline = definition.baseline or BASELINE
    compared = [name for name in rows if name != baseline and rows[name].seeds]
    for name in compared if baseline in rows and rows[baseline].seeds and not unfair else ():
        pair = Effect(title=f"{rows[name].row} − {rows[baseline].row}", plus=(name,), minus=(baseline,))
        listed = (e for e in definition.effects if {e.plus, e.minus} == {pair.plus, pair.minus} and abs(e.scale) == 1)
        differences.append(next(listed, pair))
        effects.setdefault(differences[-1], name)
    p_values: dict[Effect, dict[str, float | None]] = {effect: {} for effect in differences}
    for metric in definition.metrics if differences else ():
        if metric.source is None:
            found = [comparison.p_value(metric.key, effect.plus, effect.minus) for effect in differences]
            adjusted = holm([1.0 if p is None else p for p in found])
            for effect, p, corrected in zip(differences, found, adjusted, strict=True):
                p_values[effect][metric.key] = None if p is None else corrected
    return tuple(_effect_row(effect, comparison, row, p_values.get(effect, {})) for effect, row in effects.items())


def _effect_row(effect: Effect, comparison: Comparison, row: str | None, p: dict[str, float | None]) -> EffectRow:
    cells = {
        # Of a cost there is no effect: times differ from run to run.
        metric.key: Contrast({}) if metric.source else comparison.contrast(metric.key, effect.plus, effect.minus, effect.scale)
        for metric in comparison.definition.metrics
    }
    return EffectRow(effect.title, tuple(comparison.seeds([*effect.plus, *effect.minus])), cells, row, p)


def _fact_value(source: str, records: list[Record], published: Any) -> Any:
    """Return the fact from the records, or the published one if no record has it."""
    values = [value for record in records if (value := _lookup(record, source)) is not None]
    if any(value != values[0] for value in values):
        return " / ".join(sorted({str(value) for value in values}))
    return values[0] if values else published


def _lookup(record: Record, source: str) -> Any:
    """Return the record's value under the key `source`, or the joined values of several: `verify.gflops_neck + ...`."""
    values = [record.get(key) for key in source.split(" + ")]
    if len(values) == 1 or None in values:
        return values[0] if len(values) == 1 else None
    return " + ".join(f"{value:.1f}" if isinstance(value, float) else str(value) for value in values)


def _cell(metric: Metric, records: list[Record], spec: RowSpec, replicates: Replicates) -> Cell:
    values, resampled = {}, {}
    for record in records:
        values[record["seed"]] = metric.read(record)
        fractions = None if metric.source else replicates.get(record["fingerprint"], {}).get(metric.name_in(record))
        if fractions is not None:
            resampled[record["seed"]] = fractions * metric.scale
    return Cell(values, spec.published.get(metric.key), resampled)


def _metrics(records: list[Record]) -> set[str]:
    """Return the metrics that are defined in any record, and their object sizes even if undefined in all of them."""
    metrics = {key: key.removeprefix("metrics.") for key in records[0] if key.startswith("metrics.")}
    defined = {name for key, name in metrics.items() if any(record[key] is not None for record in records)}
    bases = {name.partition("_")[0] for name in defined}
    return {name for name in metrics.values() if name in defined or name.partition("_")[0] in bases}


def _unreadable_of(table: str, unreadable: list[str]) -> list[str]:
    """Return the unreadable files of this table's run folders, and those outside run folders, which may be of any table."""
    return [item for item in unreadable if table in (parts := item.split(": ")[0].split("/")) or len(parts) < 5]

"""Which records stand in a table: of one setting, of one configuration a row, one a seed. What is left out is named."""

from collections.abc import Collection, Iterable
from datetime import datetime

from fpn_ablate.config.factors import under
from fpn_ablate.report.collate import footer
from fpn_ablate.report.collate.records import factors_of, time_of
from fpn_ablate.report.collate.table import Record
from fpn_ablate.utils.errors import UserError


def one_setting(
    records: list[Record], wanted: Collection[str] | None = None, allow_unfair: bool = False
) -> tuple[list[Record], list[list[Record]]]:
    """The records of one setting and, setting by setting, the others.

    The setting is the one of `wanted` that has records here, or, where none has, the newest. With `allow_unfair` all records
    stand together; the others are named all the same.

    Raises:
        UserError: several of `wanted` have records, so rows that are meant for one table cannot be compared.
    """
    settings: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        # Runs do not know another evaluator for another run: figures of two do not stand side by side all the same.
        settings.setdefault((record["setting"], str(record.get("environment.evaluator"))), []).append(record)
    asked = sorted(name for name in settings if name[0] in (wanted or ()))
    chosen = asked or [max(settings, key=lambda name: (_newest(settings[name]), name))]
    if len(chosen) > 1 and not allow_unfair:
        raise UserError(_unfair([settings[name] for name in chosen]))
    ours = settings.pop(chosen[0])
    return records if allow_unfair else ours, [settings[name] for name in sorted(settings)]


def one_record_a_seed(records: list[Record], named: Collection[str]) -> tuple[list[Record], list[str]]:
    """Of records of one setting those to show, and a line on each kind of record left out.

    A row is its newest finished record and those that share its factors. Of rows that are one experiment under several
    names, the one in `named` stands, else the newest.
    """
    rows: dict[str, list[Record]] = {}
    for record in records:
        rows.setdefault(record["row"], []).append(record)
    left: dict[tuple[str, str], set[int]] = {}
    kept: dict[str, Record] = {}
    for row in sorted(rows, key=lambda row: (row in named, _newest(rows[row]), row), reverse=True):
        standing, replaced = _of_one_row(rows[row])
        for record, other in replaced:
            text = footer.differences([other], [record], factors=True) or "no key that they hold differs"
            left.setdefault((row, f"not the newest finished: {text}"), set()).add(record["seed"])
        for record in standing:
            first = kept.setdefault(record["fingerprint"], record)
            if first is not record:
                same = f"the same experiment as row '{first['row']}', seed {first['seed']}"
                same = f"the same experiment as row '{first['row']}'" if first["seed"] == record["seed"] else same
                left.setdefault((row, same), set()).add(record["seed"])
    return list(kept.values()), [f"row '{row}', {_seeds(seeds)}: {text}" for (row, text), seeds in sorted(left.items())]


def _of_one_row(records: list[Record]) -> tuple[list[Record], list[tuple[Record, Record]]]:
    """The records that stand, one a seed, and the others, each with the one that stands in its place."""
    ordered = sorted(records, key=_age, reverse=True)
    seeds: dict[int, Record] = {}
    replaced = []
    for record in ordered:
        # Seeds of other factors would be averaged with these.
        stands = _factors(record) == _factors(ordered[0])
        other = seeds.setdefault(record["seed"], record) if stands else seeds.get(record["seed"], ordered[0])
        if other is not record:
            replaced.append((record, other))
    return list(seeds.values()), replaced


def _factors(record: Record) -> Record:
    """In what rows may differ. Where the backbone is a factor, what its weights are is no part of the setting either."""
    return {key: value for key, value in record.items() if key == "weights" or under(key, factors_of(record), "config.")}


def _unfair(groups: list[list[Record]]) -> str:
    table, recipe, data = (groups[0][0][key] for key in ("table", "recipe", "data"))
    factors = ", ".join(footer.declared_factors(record for group in groups for record in group))
    first, *others = groups
    rows = [", ".join(sorted({record["row"] for record in group})) for group in groups]
    found = [footer.differences(first, other, versus=" against ") for other in others]
    keys = dict.fromkeys(text or "what the files of data or weights hold" for text in found)
    return (
        f"table '{table}' (recipe {recipe}, data {data}): the rows of this sweep differ in more than {factors}, so "
        f"they cannot be compared. {'; '.join(keys)} (rows {' | '.join(rows)}). Give every row the same, or take the row out; "
        "the records stay, and python -m fpn_ablate report RUNS --allow-unfair shows them together"
    )


def _seeds(seeds: Iterable[int]) -> str:
    seeds = sorted(seeds)
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def _newest(records: list[Record]) -> tuple[bool, datetime, str]:
    """The age of a group: that of its newest finished record, or, before any has finished, of its newest record."""
    return max(map(_age, records))


def _age(record: Record) -> tuple[bool, datetime, str]:
    return record["status"] == "finished", time_of(record.get("finished") or record.get("started")), record["folder"] or ""

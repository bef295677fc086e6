"""Choose the records of a table: one setting, one configuration a row, one record a seed. Name what is left out."""

import json
from collections.abc import Collection, Iterable, Mapping
from datetime import datetime

from fpn_ablate.config.factors import under
from fpn_ablate.config.schema import INCIDENTAL
from fpn_ablate.report.collate.records import factors_of, time_of
from fpn_ablate.report.collate.table import Record
from fpn_ablate.utils.errors import UserError

# Keys of a configuration that are not part of a setting.
NOT_IN_SETTING = ("seed", *INCIDENTAL)
# Keys beyond the configuration in which two settings can differ.
BEYOND_CONFIG = (
    "images.count",
    "images.digest",
    "weights",
    "environment.evaluator",
    "environment.version",
    "environment.commit",
    "environment.device",
    "environment.torch",
    "deterministic",
    "bf16",
    "code",
)
MAX_DIFFERENCES = 6


def select_setting(
    records: list[Record], requested: Collection[str] | None = None, allow_unfair: bool = False
) -> tuple[list[Record], list[list[Record]]]:
    """Return the records of one setting and, grouped by setting, the others.

    The setting is the one of `requested` that has records here; if none has, the newest.

    Raises:
        UserError: several of `requested` have records, so rows meant for one table cannot be compared; not if `allow_unfair`.
    """
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        # The evaluator is not part of a run's setting, but figures of two evaluators must not stand side by side.
        groups.setdefault((record["setting"], str(record.get("environment.evaluator"))), []).append(record)
    matching = sorted(key for key in groups if key[0] in (requested or ()))
    chosen = matching or [max(groups, key=lambda key: (max(map(_age, groups[key])), key))]
    if len(chosen) > 1 and not allow_unfair:
        unfair = unfair_message([groups[key] for key in chosen])
        raise UserError(
            f"{unfair}; the records are kept, and python -m fpn_ablate report RUNS --allow-unfair shows them together"
        )
    return groups.pop(chosen[0]), [groups[key] for key in sorted(groups)]


def select_code(records: list[Record]) -> tuple[list[Record], list[str]]:
    """Select the records of one setting that agree on the code of their parts, and return them with a line on all others.

    A setting does not hold the code of parts in which rows may differ. The newest finished record of a part's code counts.
    """
    current: dict[str, str] = {}
    selected: list[Record] = []
    left_out: dict[tuple[str, str], set[int]] = {}
    for record in sorted(records, key=_age, reverse=True):
        parts = {key: sha for key, sha in record.items() if key.startswith("parts.") and sha is not None}
        others = [key.removeprefix("parts.") for key, sha in parts.items() if current.get(key, sha) != sha]
        if others:
            text = f"not the newest code of {', '.join(sorted(others))}"
            left_out.setdefault((record["row"], text), set()).add(record["seed"])
        else:
            current |= parts
            selected.append(record)
    return selected, _left_out_lines(left_out)


def select_records(records: list[Record], defined: Mapping[str, str]) -> tuple[list[Record], list[str]]:
    """Select the records of one setting to show, and return them with a line on each kind of record left out.

    A row consists of its newest finished record and the records with the same factors. One experiment counts under each of
    its names. Names of one row of the definition are one: the newest is kept.

    Args:
        defined: {name: first name of the row} of the definition.
    """
    rows: dict[str, list[Record]] = {}
    for record in records:
        rows.setdefault(record["row"], []).append(record)
    left_out: dict[tuple[str, str], set[int]] = {}
    selected: dict[tuple[str, str], Record] = {}
    for row in sorted(rows, key=lambda row: (max(map(_age, rows[row])), row), reverse=True):
        newest, *_ = ordered = sorted(rows[row], key=_age, reverse=True)
        current: dict[int, Record] = {}
        for record in ordered:
            # Seeds with other factors must not be averaged with these.
            same_factors = _factors(record) == _factors(newest)
            other = current.setdefault(record["seed"], record) if same_factors else current.get(record["seed"], newest)
            if other is not record:
                text = describe_differences([other], [record], factors=True) or "other threads, or a key that they do not hold"
                left_out.setdefault((row, f"not the newest finished: {text}"), set()).add(record["seed"])
        for record in current.values():
            first = selected.setdefault((defined.get(row, row), record["fingerprint"]), record)
            if first is not record:
                seed = "" if first["seed"] == record["seed"] else f", seed {first['seed']}"
                left_out.setdefault((row, f"the same experiment as row '{first['row']}'{seed}"), set()).add(record["seed"])
    return list(selected.values()), _left_out_lines(left_out)


def _factors(record: Record) -> Record:
    """Return the part of a record in which rows may differ.

    It includes the digest of the weights: if the backbone is a factor, its weights are not part of the setting.
    """
    return {key: value for key, value in record.items() if key == "weights" or under(key, factors_of(record), "config.")}


def unfair_message(groups: list[list[Record]]) -> str:
    """Return the message that the groups' rows cannot stand in one table, with the keys in which they differ and the fix.

    A record of a run that has not started holds `table`, `recipe`, `data`, `row` and the configuration.
    """
    table, recipe, data = (groups[0][0][key] for key in ("table", "recipe", "data"))
    factors = ", ".join(declared_factors(record for group in groups for record in group))
    first, *others = groups
    rows = [", ".join(sorted({record["row"] for record in group})) for group in groups]
    differences = [describe_differences(first, other, separator=" against ") for other in others]
    keys = dict.fromkeys(text or "the content of the data or weight files" for text in differences)
    return (
        f"table '{table}' (recipe {recipe}, data {data}): the rows of this sweep differ in more than {factors}, so "
        f"they cannot be compared. {'; '.join(keys)} (rows {' | '.join(rows)}). Give every row the same, or take the row out"
    )


def _left_out_lines(left_out: dict[tuple[str, str], set[int]]) -> list[str]:
    names = {key: f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, sorted(seeds)))}" for key, seeds in left_out.items()}
    return [f"row '{row}', {names[row, text]}: {text}" for row, text in sorted(left_out)]


def _age(record: Record) -> tuple[bool, datetime, str]:
    """Return a sort key: finished records after others, then by time."""
    return record["status"] == "finished", time_of(record.get("finished") or record.get("started")), record["folder"] or ""


def describe_differences(records: list[Record], others: list[Record], factors: bool = False, separator: str = ", here ") -> str:
    """Describe the keys for which two groups share no value, the others' value first; empty if there are none.

    The declared factors are left out unless `factors` is set.
    """
    keys = sorted({key for record in (*records, *others) for key in record if key.startswith("config.")})
    declared = () if factors else declared_factors([*records, *others])
    keys = [key for key in keys if key.split(".")[1] not in NOT_IN_SETTING and not under(key, declared, "config.")]
    parts = []
    if declared_factors(records) != declared_factors(others):
        parts.append(f"factors {', '.join(declared_factors(others))}{separator}{', '.join(declared_factors(records))}")
    for key in (*keys, *BEYOND_CONFIG):
        values, other_values = _values(records, key), _values(others, key)
        if not values & other_values:
            parts.append(f"{key.removeprefix('config.')} {_join(other_values)}{separator}{_join(values)}")
    if len(parts) > MAX_DIFFERENCES:
        parts[MAX_DIFFERENCES:] = [f"and {len(parts) - MAX_DIFFERENCES} more keys"]
    return "; ".join(parts)


def declared_factors(records: Iterable[Record]) -> tuple[str, ...]:
    """Return the factors that any of the records declares."""
    return tuple(sorted({factor for record in records for factor in factors_of(record)}))


def _values(records: list[Record], key: str) -> set[str]:
    return {json.dumps(record.get(key), sort_keys=True) for record in records}


def _join(values: set[str]) -> str:
    return "/".join(value.strip('"') if value != "null" else "unset" for value in sorted(values))

"""Compare groups of records: name the keys in which their settings (or factors) differ."""

import json
from collections.abc import Iterable

from fpn_ablate.config.factors import under
from fpn_ablate.config.schema import INCIDENTAL
from fpn_ablate.report.collate.records import factors_of
from fpn_ablate.report.collate.table import Record

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
    "code",
)
MAX_DIFFERENCES = 6


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

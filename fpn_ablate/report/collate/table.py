"""Define what a collated table holds: rows, cells, effects, claims and their verdicts."""

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fpn_ablate.report.collate.cells import Cell, Contrast
from fpn_ablate.report.collate.definition import (
    Definition,
)


@dataclass(frozen=True)
class Claim:
    """That a difference of rows lies above and/or below a bound, in points. `less`: a metric whose difference is taken away.
    Rows by the first of their names; `ours` where nobody has published it."""

    table: str
    text: str
    metric: str
    plus: tuple[str, ...]
    minus: tuple[str, ...]
    above: float = -math.inf
    below: float = math.inf
    less: str | None = None
    ours: bool = False

    @property
    def bounds(self) -> tuple[float, ...]:
        return tuple(bound for bound in (self.above, self.below) if math.isfinite(bound))


@dataclass(frozen=True)
class Verdict:
    """What the runs say to a claim.

    Attributes:
        found: the difference; None where no seed has all rows.
        p: the p-value of the verdict, after Holm's correction over the claims of the table; None where nothing was compared.
        needed: seeds that would tell, where it is inconclusive; None: not even 1000, or not known.
        why: what stands in the way of a verdict, where it is not the interval.
    """

    claim: Claim
    verdict: str
    found: Contrast | None = None
    p: float | None = None
    needed: int | None = None
    why: str | None = None

    @property
    def published(self) -> float | None:
        """The published difference; None for claims of ours, whatever published rows it would follow from."""
        return None if self.claim.ours or self.found is None else self.found.published


Record = dict[str, Any]  # one record, flat, with dots in its keys
Replicates = Mapping[str, Mapping[str, np.ndarray]]  # {fingerprint: {metric: (B,) fractions}}
Key = tuple[str, str, str]  # table, recipe, data
UNFAIR = "UNFAIR: rows differ in more than the declared factors (see below)"
SOURCES = "sources"  # no table: what other cells learned from. Its records stand in the ledger


@dataclass(frozen=True)
class Row:
    """One row with a cell for each metric.

    `states` says of every seed that has a record how it fared (`health.state`), `folders` where its run lies, if on this disk.
    """

    row: str
    label: str
    letter: str | None
    facts: dict[str, Any]
    published: dict[str, Any]
    cells: dict[str, Cell]
    states: dict[int, str]
    errors: dict[int, str]
    folders: dict[int, Path]
    records: tuple[Record, ...] = ()
    published_only: bool = False

    @property
    def seeds(self) -> tuple[int, ...]:
        """Healthy, finished seeds: those in the means."""
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
    cells: dict[str, Contrast]


@dataclass(frozen=True)
class Table:
    """One table: the rows of a definition, filled with the records of one setting.

    Attributes:
        same_data: evaluated on the paper's data.
        verdicts: on the claims of this table.
        control: the A/A control's second half, where it has been run.
        best: (row, metric) of the best cells, where the intervals of all differences say that they are.
        unfair: rows of several settings stand together, on request; nothing is judged then.
    """

    recipe: str
    data: str
    generated: bool
    same_data: bool
    setting: str
    definition: Definition
    rows: tuple[Row, ...]
    effects: tuple[Difference, ...]
    footer: tuple[tuple[str, str], ...]
    verdicts: tuple[Verdict, ...] = ()
    control: Row | None = None
    best: frozenset[tuple[str, str]] = frozenset()
    unfair: bool = False

    @property
    def key(self) -> Key:
        return self.definition.table, self.recipe, self.data

    @property
    def name(self) -> str:
        return file_name(self.key) + "-unfair" * self.unfair

    @property
    def warning(self) -> str:
        """What must stand above the table, in every format."""
        return ". ".join([UNFAIR] * self.unfair + [GENERATED] * self.generated)

    @property
    def watermark(self) -> str:
        """The warning in two words or four, for pictures."""
        return " / ".join(part.partition(":")[0] for part in self.warning.split(". "))

    @property
    def published(self) -> bool:
        return any(cell.published is not None for row in self.rows for cell in row.cells.values())


def file_name(key: Key) -> str:
    """`<table>-<data>-<recipe>` in harmless characters, at most 100; a hash keeps altered names apart."""
    table, recipe, data = key
    raw = "-".join((table, data, recipe))
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", raw).strip(".")
    if safe == raw and len(raw) <= 100:
        return raw
    return f"{safe[:91]}-{hashlib.sha256(repr(key).encode()).hexdigest()[:8]}"


GENERATED = "GENERATED DATA: not comparable with COCO"

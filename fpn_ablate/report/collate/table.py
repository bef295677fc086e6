"""Types of a collated table: rows, effects, claims and their verdicts."""

import hashlib
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from fpn_ablate.report.collate.cells import Cell, Contrast
from fpn_ablate.report.collate.definition import Definition, Entry, Flag, Metric, Names, Number, Text
from fpn_ablate.report.collate.stats import Look

Record = dict[str, Any]  # one record, flat, with dots in its keys
Key = tuple[str, str, str]  # table, recipe, data
GENERATED = "GENERATED DATA: not comparable with COCO"
SMOKE = "RECIPE smoke: its few steps teach a row nothing"
UNFAIR = "UNFAIR: rows differ in more than the declared factors (see below)"


def clean(text: Any) -> str:
    """Return a text as one line without control characters; names and messages come from users and files."""
    return "".join(char if char.isprintable() else "�" for char in " ".join(str(text).split()))


class Claim(Entry):
    """A statement that a difference of rows, in points, or their ratio lies above and/or below a bound.

    Attributes:
        plus: rows, by the first of their names.
        minus: rows whose mean is subtracted.
        less: a metric whose difference is subtracted from that of `metric`.
        ratio: True if `plus` is divided by `minus`, and the bounds are ratios, as of costs.
        ours: True if nobody has published the statement.
    """

    table: Text
    text: Text = Field(alias="claim")
    metric: Text
    plus: Names
    minus: Names
    above: Number = -math.inf
    below: Number = math.inf
    less: Text | None = None
    ratio: Flag = False
    ours: Flag = False

    @property
    def bounds(self) -> tuple[float, ...]:
        return tuple(bound for bound in (self.above, self.below) if math.isfinite(bound))

    @property
    def interval(self) -> tuple[float, float]:
        """Return the bounds of the contrast, which of a ratio is its logarithm."""
        if not self.ratio:
            return self.above, self.below
        return math.log(self.above) if math.isfinite(self.above) else -math.inf, math.log(self.below)

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if not self.bounds or self.above >= self.below:
            raise ValueError("needs 'above' or 'below', or both with above < below, as numbers")
        if self.ratio and (min(self.bounds) <= 0 or self.less):
            raise ValueError("a ratio needs bounds above 0, and no 'less'")
        return self


@dataclass(frozen=True)
class Verdict:
    """The outcome of testing a claim on the runs.

    Attributes:
        verdict: `supported`, `contradicted`, `inconclusive`, `not judged yet` while planned seeds are missing, or `no result`:
            its rows have no healthy run at a common seed.
        contrast: the difference of rows, over the seeds of the look; None if no seed has all rows.
        p: the p-value of the verdict, after correction for looks and, by Holm, for the claims of the table; None if nothing
            was compared.
        seeds_needed: for an inconclusive claim, the seeds that would decide it; None: unknown, or more than MAX_SEEDS.
        look: at which the claim was tested; None if it was not.
        available: the seeds that all rows have.
        reason: why there is no verdict, if not because of the interval.
    """

    claim: Claim
    verdict: str
    contrast: Contrast | None = None
    p: float | None = None
    seeds_needed: int | None = None
    look: Look | None = None
    available: int = 0
    reason: str | None = None

    @property
    def published(self) -> float | None:
        """Return the published difference; None for claims of ours, even if published rows would imply one."""
        return None if self.claim.ours or self.contrast is None else self.contrast.published


@dataclass(frozen=True)
class Row:
    """One row with a cell for each metric.

    Attributes:
        states: how each seed with a record ended (`health.state`).
        errors: {seed: message} of the runs that are not healthy.
        folders: {seed: folder of the run}, if it is on this disk.
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
    def name(self) -> str:
        """Return the name as tables print it."""
        return clean(f"({self.letter}) {self.label}" if self.letter else self.label)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Return the healthy, finished seeds: those in the means."""
        return tuple(seed for seed, state in self.states.items() if state == "finished")

    @property
    def shown(self) -> tuple[int, ...]:
        """Return the seeds of the cells: those in the means, or if there is none, those that learned nothing."""
        return self.seeds or tuple(seed for seed, state in self.states.items() if state == "unhealthy")

    @property
    def finished(self) -> list[Record]:
        """Return the records of these seeds."""
        return [record for record in self.records if record["seed"] in self.seeds]

    @property
    def state(self) -> str:
        """Return `finished` if any seed is, `not run` without a record, else the state of all seeds (`failed` if mixed)."""
        if self.published_only:
            return "published only"
        if self.seeds:
            return "finished"
        states = set(self.states.values()) or {"not run"}
        return states.pop() if len(states) == 1 else "failed"


@dataclass(frozen=True)
class EffectRow:
    """An effect of the definition or a row's difference from the baseline; cells are over the seeds that its rows share.

    Attributes:
        row: whose difference it is, if the definition does not list the same.
        p: {metric: p-value of a difference from the baseline}, corrected for looks and, by Holm, for the table's rows.
    """

    title: str
    seeds: tuple[int, ...]
    cells: dict[str, Contrast]
    row: str | None = None
    p: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """One table: the rows of a definition, filled with the records of one setting.

    Attributes:
        same_data: evaluated on the paper's data.
        verdicts: on the claims of this table.
        control: the row trained again with the control seeds (A/A), if there is one.
        best: (row, metric) of the best cells, where the intervals of all differences say so.
        unfair: rows of several settings stand together, on request; no claim is judged then.
    """

    recipe: str
    data: str
    generated: bool
    same_data: bool
    setting: str
    definition: Definition
    rows: tuple[Row, ...]
    effects: tuple[EffectRow, ...]
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
        """Return the warning that every format prints above the table, or an empty text."""
        is_smoke = self.recipe.split("+")[0] == "smoke"
        return ". ".join([UNFAIR] * self.unfair + [GENERATED] * self.generated + [SMOKE] * is_smoke)

    @property
    def watermark(self) -> str:
        """Return the warning in at most four words, for pictures."""
        return " / ".join(part.partition(":")[0] for part in self.warning.split(". "))

    @property
    def difference_label(self) -> str:
        return "Δ" if self.same_data else "Δ other data"

    @property
    def all_rows(self) -> list[Row]:
        """Return the rows, and the control."""
        return [*self.rows, *([self.control] if self.control else [])]

    @property
    def finished_rows(self) -> list[Row]:
        """Return the rows with at least one finished seed."""
        return [row for row in self.rows if row.seeds]

    @property
    def main_metric(self) -> Metric | None:
        """Return the first metric that is not a cost."""
        return next((metric for metric in self.definition.metrics if metric.source is None), None)

    @property
    def seeds_to_judge(self) -> int:
        """Return the number of seeds before which no claim is judged."""
        return max(2, len(self.definition.seeds))

    @property
    def published(self) -> bool:
        return any(cell.published is not None for row in self.rows for cell in row.cells.values())


def file_name(key: Key) -> str:
    """Return `<table>-<data>-<recipe>` in safe characters, at most 100; a name that was altered gets a hash to stay unique."""
    table, recipe, data = key
    raw = "-".join((table, data, recipe))
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", raw).strip(".")
    if safe == raw and len(raw) <= 100:
        return raw
    return f"{safe[:91]}-{hashlib.sha256(repr(key).encode()).hexdigest()[:8]}"

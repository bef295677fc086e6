"""One metric of one row, over seeds and images; and differences between rows, seed by seed and image by image."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean

import numpy as np

from fpn_ablate.report.collate.stats import Estimate, estimate


@dataclass(frozen=True)
class Cell:
    """Values in the table's unit (percent), of finished seeds; `resampled` the same on drawn images, where a run left that."""

    values: dict[int, float | None]
    published: float | None = None
    resampled: dict[int, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def ours(self) -> Estimate:
        return estimate(self.values, self.resampled)

    @property
    def difference(self) -> float | None:
        """Ours minus published."""
        return None if self.ours.mean is None or self.published is None else self.ours.mean - self.published


@dataclass(frozen=True)
class Contrast(Cell):
    """A difference of means over rows, over the seeds that all its cells have.

    Attributes:
        apart: its variance if the rows had neither seeds nor images in common.
        power: sum of the squared weights of its rows: 2 for one row less another.
        noise: what it may be by chance if all rows were equal (A/A control); None without a control.
        blind: other cells of the table know what the images do, and this one does not, so that its interval is too narrow.
    """

    apart: float | None = None
    power: float = 2.0
    noise: float | None = None
    blind: bool = False

    @property
    def removed(self) -> float | None:
        """The share of the variance that pairing has removed; below 0 where the rows vary against each other."""
        return None if not self.apart or self.ours.error is None else 1 - self.ours.error**2 / self.apart

    @property
    def within_noise(self) -> bool:
        return self.noise is not None and self.ours.mean is not None and abs(self.ours.mean) < self.noise

    @property
    def is_gain(self) -> bool:
        """Whether the interval says that it is above 0."""
        return not self.blind and self.ours.excludes(0.0) and self.ours.mean > 0


def beyond(cell: Cell, other: Cell) -> Cell:
    """One metric of a row less another of the same runs."""
    seeds = [seed for seed in cell.values if seed in other.values]
    values = {s: None if None in (cell.values[s], other.values[s]) else cell.values[s] - other.values[s] for s in seeds}
    drawn = {s: cell.resampled[s] - other.resampled[s] for s in seeds if s in cell.resampled and s in other.resampled}
    published = None if None in (cell.published, other.published) else cell.published - other.published
    return Cell(values, published, drawn)


def contrast(plus: Sequence[Cell], minus: Sequence[Cell], seeds: Sequence[int], scale: float = 1.0) -> Contrast:
    """`scale` x (mean of `plus` - mean of `minus`), paired; undefined for a seed where a cell is."""
    weights = [scale / len(plus)] * len(plus) + [-scale / len(minus)] * len(minus)
    cells = [*plus, *minus]

    def combined(values: Sequence[float | None]) -> float | None:
        if None in values:
            return None
        return scale * (fmean(values[: len(plus)]) - fmean(values[len(plus) :]))

    values = {seed: combined([cell.values.get(seed) for cell in cells]) for seed in seeds}
    drawn = {
        seed: sum(weight * cell.resampled[seed] for weight, cell in zip(weights, cells, strict=True))
        for seed in seeds
        if all(seed in cell.resampled for cell in cells)
    }
    defined = [seed for seed in seeds if values[seed] is not None]
    power = sum(weight**2 for weight in weights)
    return Contrast(values, combined([cell.published for cell in cells]), drawn, _apart(cells, weights, defined), power)


def _apart(cells: Sequence[Cell], weights: Sequence[float], seeds: Sequence[int]) -> float | None:
    """The sum of the cells' own variances; None where one is unknown."""
    own = [
        estimate({s: c.values[s] for s in seeds}, {s: c.resampled[s] for s in seeds if s in c.resampled}).error for c in cells
    ]
    if not seeds or None in own:
        return None
    return sum((weight * error) ** 2 for weight, error in zip(weights, own, strict=True))

"""Hold one metric of one row over seeds and images, and compute differences of rows seed by seed and image by image."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean

import numpy as np

from fpn_ablate.report.collate.stats import Estimate, estimate


@dataclass(frozen=True)
class Cell:
    """One metric of one row, in the table's unit (percent), by seed; finished seeds only.

    `resampled` has the same metric on bootstrap images, (B,) for each seed whose run saved that.
    """

    values: dict[int, float | None]
    published: float | None = None
    resampled: dict[int, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def ours(self) -> Estimate:
        return estimate(self.values, self.resampled)

    @property
    def difference(self) -> float | None:
        """Return ours minus published."""
        return None if self.ours.mean is None or self.published is None else self.ours.mean - self.published


@dataclass(frozen=True)
class Contrast(Cell):
    """A difference of means over rows, over the seeds that all its cells have.

    Attributes:
        unpaired_variance: its variance if the rows shared neither seeds nor images.
        squared_weights: sum of the squared weights of its rows: 2 for the difference of two rows.
        noise: how large it may be by chance if all rows were equal (A/A control); None without a control.
        lacks_replicates: other cells of the table include the variance of the images and this one does not, so that its
            interval is too narrow.
        ratio: it is the logarithm of a ratio of means.
    """

    unpaired_variance: float | None = None
    squared_weights: float = 2.0
    noise: float | None = None
    lacks_replicates: bool = False
    ratio: bool = False

    def shown(self, value: float | None) -> float | None:
        """Return one of its figures as it is read: of a ratio the ratio itself."""
        return math.exp(value) if self.ratio and value is not None else value

    @property
    def variance_removed(self) -> float | None:
        """Return the share of the variance that pairing removed; negative if the rows vary against each other."""
        if not self.unpaired_variance or self.ours.standard_error is None:
            return None
        return 1 - self.ours.standard_error**2 / self.unpaired_variance

    @property
    def within_noise(self) -> bool:
        return self.noise is not None and self.ours.mean is not None and abs(self.ours.mean) < self.noise


def subtract_metric(cell: Cell, other: Cell) -> Cell:
    """Subtract one metric of a row from another, within each run."""
    seeds = [seed for seed in cell.values if seed in other.values]
    values = {s: None if None in (cell.values[s], other.values[s]) else cell.values[s] - other.values[s] for s in seeds}
    resampled = {s: cell.resampled[s] - other.resampled[s] for s in seeds if s in cell.resampled and s in other.resampled}
    published = None if None in (cell.published, other.published) else cell.published - other.published
    return Cell(values, published, resampled)


def logarithm(cell: Cell) -> Cell:
    """Return the logarithm of a cell, whose differences are ratios; undefined where it is not above 0."""
    values = {s: math.log(v) if v is not None and v > 0 else None for s, v in cell.values.items()}
    resampled = {s: np.log(np.where(draws > 0, draws, np.nan)) for s, draws in cell.resampled.items()}
    published = math.log(cell.published) if cell.published is not None and cell.published > 0 else None
    return Cell(values, published, resampled)


def contrast(plus: Sequence[Cell], minus: Sequence[Cell], seeds: Sequence[int], scale: float = 1.0) -> Contrast:
    """Compute `scale` x (mean of `plus` - mean of `minus`), paired by seed; undefined for a seed if any cell is."""
    weights = [scale / len(plus)] * len(plus) + [-scale / len(minus)] * len(minus)
    cells = [*plus, *minus]

    def combined(values: Sequence[float | None]) -> float | None:
        if None in values:
            return None
        return scale * (fmean(values[: len(plus)]) - fmean(values[len(plus) :]))

    values = {seed: combined([cell.values.get(seed) for cell in cells]) for seed in seeds}
    resampled = {
        seed: sum(weight * cell.resampled[seed] for weight, cell in zip(weights, cells, strict=True))
        for seed in seeds
        if all(seed in cell.resampled for cell in cells)
    }
    defined = [seed for seed in seeds if values[seed] is not None]
    published = combined([cell.published for cell in cells])
    squared_weights = sum(weight**2 for weight in weights)
    return Contrast(values, published, resampled, _unpaired_variance(cells, weights, defined), squared_weights)


def _unpaired_variance(cells: Sequence[Cell], weights: Sequence[float], seeds: Sequence[int]) -> float | None:
    """Return the weighted sum of the cells' variances; None if one is unknown."""
    estimates = [
        estimate({s: cell.values[s] for s in seeds}, {s: cell.resampled[s] for s in seeds if s in cell.resampled})
        for cell in cells
    ]
    errors = [each.standard_error for each in estimates]
    if not seeds or None in errors:
        return None
    return sum((weight * error) ** 2 for weight, error in zip(weights, errors, strict=True))

"""One metric of one row, over seeds and images; and differences between rows, seed by seed and image by image."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean

import numpy as np

from fpn_ablate.report.stats import Estimate, estimate


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
    """A difference of means over rows, over the seeds that all its cells have. `apart`: its variance if the rows had neither
    seeds nor images in common."""

    apart: float | None = None

    @property
    def removed(self) -> float | None:
        """The share of the variance that pairing has removed; below 0 where the rows vary against each other."""
        return None if not self.apart or self.ours.error is None else 1 - self.ours.error**2 / self.apart


def contrast(plus: Sequence[Cell], minus: Sequence[Cell], seeds: Sequence[int], scale: float = 1.0) -> Contrast:
    """`scale` x (mean of `plus` - mean of `minus`), paired; undefined for a seed where a cell is."""
    weights = [scale / len(plus)] * len(plus) + [-scale / len(minus)] * len(minus)
    cells = [*plus, *minus]

    def value(seed: int) -> float | None:
        values = [cell.values.get(seed) for cell in cells]
        if None in values:
            return None
        return scale * (fmean(values[: len(plus)]) - fmean(values[len(plus) :]))

    values = {seed: value(seed) for seed in seeds}
    drawn = {
        seed: sum(weight * cell.resampled[seed] for weight, cell in zip(weights, cells, strict=True))
        for seed in seeds
        if all(seed in cell.resampled for cell in cells)
    }
    published = [cell.published for cell in cells]
    paper = None if None in published else scale * (fmean(published[: len(plus)]) - fmean(published[len(plus) :]))
    return Contrast(values, paper, drawn, _apart(cells, weights, [seed for seed in seeds if values[seed] is not None]))


def beyond(first: Contrast, second: Contrast) -> Contrast:
    """A difference of two differences, taken on the same seeds: the effect on one metric beyond that on another."""
    found = contrast([first], [second], [seed for seed in first.values if seed in second.values])
    apart = None if None in (first.apart, second.apart) else first.apart + second.apart
    return Contrast(found.values, found.published, found.resampled, apart)


def _apart(cells: Sequence[Cell], weights: Sequence[float], seeds: Sequence[int]) -> float | None:
    """The sum of the cells' own variances; None where one is unknown."""
    own = [
        estimate({s: c.values[s] for s in seeds}, {s: c.resampled[s] for s in seeds if s in c.resampled}).error for c in cells
    ]
    if not seeds or None in own:
        return None
    return sum((weight * error) ** 2 for weight, error in zip(weights, own, strict=True))

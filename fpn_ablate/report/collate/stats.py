"""Intervals and verdicts for means over seeds, on images that all rows share.

A metric of a row varies with the seed of its training and with the images that it is evaluated on. Both are resampled: the
images by a bootstrap (`fpn_ablate.evaluation.bootstrap`: the same drawn images for every run), the seeds in closed form, since the
bootstrap's variance of a mean over seeds is known without drawing. Two to five seeds are too few for a percentile interval,
which misses the truth far more often than it says; so the two variances are added up and Student's t takes the place of the
percentiles. tests/report/test_coverage.py holds that to its 95 %.

S seeds, B replicates.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
MOST_SEEDS = 1000


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and how well it is known; None where it cannot be told.

    Attributes:
        n: seeds with a defined value.
        error: standard error of the mean, of which `seeds` is the variance between seeds over n and `images` the variance that
            the images add. None without a spread over seeds and without replicates.
        df: degrees of freedom; infinite where the seeds add nothing.
    """

    n: int
    mean: float | None = None
    error: float | None = None
    df: float = math.inf
    seeds: float | None = None
    images: float | None = None

    @property
    def std(self) -> float | None:
        """Sample standard deviation over the seeds."""
        return None if self.seeds is None else math.sqrt(self.seeds * self.n)

    @property
    def half(self) -> float | None:
        """Half of the 95 % interval."""
        return None if self.error is None else _t(self.df) * self.error

    @property
    def low(self) -> float | None:
        return None if self.half is None else self.mean - self.half

    @property
    def high(self) -> float | None:
        return None if self.half is None else self.mean + self.half

    def excludes(self, value: float) -> bool:
        """Whether the interval says that the mean is not `value`; never from one seed, which cannot speak of seeds."""
        return self.n > 1 and self.half is not None and abs(self.mean - value) > self.half

    def above(self, bound: float) -> float:
        """The p-value, one-sided, against the mean being at most `bound`; 1 from one seed."""
        if self.n < 2 or self.error is None:
            return 1.0
        return float(self.mean <= bound) if self.error == 0 else _tail((self.mean - bound) / self.error, self.df)

    def below(self, bound: float) -> float:
        """The p-value, one-sided, against the mean being at least `bound`; 1 from one seed."""
        if self.n < 2 or self.error is None:
            return 1.0
        return float(self.mean >= bound) if self.error == 0 else _tail((bound - self.mean) / self.error, self.df)


def estimate(values: Mapping[int, float | None], resampled: Mapping[int, np.ndarray] | None = None) -> Estimate:
    """The mean over the seeds whose value is defined.

    Args:
        values: {seed: value}; None and non-finite ones are left out, and `n` says so.
        resampled: {seed: (B,) values on drawn images}, the same images for all seeds; a seed may lack them.
    """
    defined = {seed: float(v) for seed, v in values.items() if v is not None and math.isfinite(v)}
    if not defined:
        return Estimate(0)
    n, mean = len(defined), math.fsum(defined.values()) / len(defined)
    between = float(np.var(list(defined.values()), ddof=1)) / n if n > 1 else None
    images = _images([resampled[seed] for seed in defined if seed in resampled]) if resampled else None
    if between is None and images is None:
        return Estimate(n, mean)
    variance = (between or 0.0) + (images or 0.0)
    return Estimate(n, mean, math.sqrt(variance), _degrees(n, between or 0.0, variance), between, images)


def _degrees(n: int, between: float, variance: float) -> float:
    """Degrees of freedom of a variance of which the part `between` is estimated from n seeds.

    Welch and Satterthwaite's formula has the square of the ratio. From so few seeds it is too large whenever they happen to
    agree: with three of them and little variance from the images, 95 % intervals cover 92 %. Without the square they cover 94
    to 96 % (both by simulation).
    """
    return (n - 1) * variance / between if between else math.inf


def _images(replicates: Sequence[np.ndarray]) -> float | None:
    """The variance that the images add to a mean over seeds, without what the spread between seeds holds already.

    On other images each seed's value moves by what all seeds share and by something of its own. The second is part of the
    variance between seeds; counted here as well, it would make the interval too wide. Of one seed the two cannot be told apart.

    Args:
        replicates: of those seeds that have them; the more, the better it is known.
    """
    if not replicates:
        return None
    table = np.stack(replicates)  # (S, B)
    table = table[:, np.isfinite(table).all(axis=0)]
    if table.shape[1] < 2:
        return None
    shared = float(table.mean(axis=0).var(ddof=1))
    if len(table) < 2:
        return shared
    own = table - table.mean(axis=0)
    own = own - own.mean(axis=1, keepdims=True)
    interaction = float((own**2).sum()) / ((len(table) - 1) * (table.shape[1] - 1))
    return max(shared - interaction / len(table), 0.0)


def seeds_needed(found: Estimate, bound: float, family: float = 1.0) -> int | None:
    """How many seeds would put `bound` outside the interval if mean and variances stayed; None: not even 1000, for the images
    alone are too few, or nothing is known of the spread.

    Args:
        family: of how many claims at once the interval is to hold (Bonferroni); Holm's factor for a single one.
    """
    if found.n < 2 or found.seeds is None:
        return None
    distance, spread, images = abs(found.mean - bound), found.seeds * found.n, found.images or 0.0

    def tells(n: int) -> bool:
        variance = spread / n + images
        return distance > _t(_degrees(n, spread / n, variance), family) * math.sqrt(variance)

    needed = 2 + bisect_left(range(2, MOST_SEEDS + 1), True, key=tells)
    return needed if needed <= MOST_SEEDS else None


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values that hold for all of a family at once (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, p_values[i] * (len(p_values) - rank)))
        adjusted[i] = highest
    return adjusted


def equal_rows(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Half a 95 % interval for a mean over n seeds, times the root of n, from the values of one row with some seeds and with
    others (an A/A control). A difference of two such means has the root of 2 times that.
    """
    n, m = len(first), len(second)
    if min(n, m) < 2:
        return None
    pooled = ((n - 1) * np.var(first, ddof=1) + (m - 1) * np.var(second, ddof=1)) / (n + m - 2)
    return float(_t(n + m - 2) * math.sqrt(pooled))


def _t(df: float, family: float = 1.0) -> float:
    """What half an interval is in standard errors, of which `family` at once hold in 95 %."""
    from scipy.special import stdtrit

    return float(stdtrit(df, 1 - (1 - LEVEL) / family / 2))


def _tail(t: float, df: float) -> float:
    """The probability of more than `t`."""
    from scipy.special import stdtr

    return float(stdtr(df, -t))

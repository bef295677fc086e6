"""Estimate means over seeds with their intervals and p-values, on images that all rows share.

A metric of a row varies with the training seed and with the evaluation images. Both are resampled. The images are resampled
by a bootstrap (`fpn_ablate.evaluation.bootstrap`, which draws the same images for every run). The seeds are resampled in
closed form, since the bootstrap's variance of a mean over seeds is known without drawing. Two to five seeds are too few for a
percentile interval, which misses the truth far more often than it says. So the two variances are added, and Student's t
replaces the percentiles. tests/report/test_coverage.py checks that the intervals cover 95 %.

S seeds, B replicates.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
MAX_SEEDS = 1000
MAX_SCORE = 37.0  # normal score of the smallest p-value, 1e-300
FIRST_LOOK = 0.8  # the first look's share of the 5 %; the k-th further look has 1/2^k of the rest


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its uncertainty; None where a figure cannot be computed.

    Attributes:
        n: seeds with a defined value.
        standard_error: of the mean. Its square is `seed_variance` + `image_variance`. None without a spread over seeds and
            without replicates.
        df: degrees of freedom; infinite where the seeds add nothing.
        seed_variance: the variance between seeds, over n.
        image_variance: the variance that the images add to the mean.
    """

    n: int
    mean: float | None = None
    standard_error: float | None = None
    df: float = math.inf
    seed_variance: float | None = None
    image_variance: float | None = None

    @property
    def std(self) -> float | None:
        """Return the sample standard deviation over the seeds."""
        return None if self.seed_variance is None else math.sqrt(self.seed_variance * self.n)

    @property
    def half_width(self) -> float | None:
        """Return half the width of the 95 % interval."""
        return None if self.standard_error is None else _t_quantile(self.df) * self.standard_error

    @property
    def low(self) -> float | None:
        return None if self.half_width is None else self.mean - self.half_width

    @property
    def high(self) -> float | None:
        return None if self.half_width is None else self.mean + self.half_width

    def p_above(self, bound: float) -> float:
        """Return the one-sided p-value of "the mean is above `bound`" (null: at most `bound`); 1 for one seed."""
        return self._p(self.mean - bound) if self.n > 1 else 1.0

    def p_below(self, bound: float) -> float:
        """Return the one-sided p-value of "the mean is below `bound`" (null: at least `bound`); 1 for one seed."""
        return self._p(bound - self.mean) if self.n > 1 else 1.0

    def _p(self, distance: float) -> float:
        """Return the probability of a mean that is `distance` above a true 0, or more (`_test_width`)."""
        from scipy.special import ndtr

        if not self.standard_error or math.isinf(distance):
            return float(distance <= 0)
        seeds, images = self.seed_variance or 0.0, self.image_variance or 0.0
        low, high = 0.0, MAX_SCORE
        for _ in range(50):
            middle = (low + high) / 2
            reached = _test_width(float(ndtr(-middle)), self.n, seeds, images) < abs(distance)
            low, high = (middle, high) if reached else (low, middle)
        return float(ndtr(-low if distance > 0 else low))


def estimate(values: Mapping[int, float | None], resampled: Mapping[int, np.ndarray] | None = None) -> Estimate:
    """Estimate the mean over the seeds whose value is defined.

    Args:
        values: {seed: value}; None and non-finite values are skipped, and `n` does not count them.
        resampled: {seed: (B,) values on bootstrap images}, the same images for all seeds; a seed may be missing.
    """
    defined = {seed: float(v) for seed, v in values.items() if v is not None and math.isfinite(v)}
    if not defined:
        return Estimate(0)
    n, mean = len(defined), math.fsum(defined.values()) / len(defined)
    between = float(np.var(list(defined.values()), ddof=1)) / n if n > 1 else None
    images = _image_variance([resampled[seed] for seed in defined if seed in resampled]) if resampled else None
    if between is None and images is None:
        return Estimate(n, mean)
    variance = (between or 0.0) + (images or 0.0)
    return Estimate(n, mean, math.sqrt(variance), _degrees_of_freedom(n, between or 0.0, variance), between, images)


def _degrees_of_freedom(n: int, between: float, variance: float) -> float:
    """Return the degrees of freedom of `variance`, whose part `between` is estimated from n seeds.

    The Welch-Satterthwaite formula has the square of the ratio. With few seeds that is too large whenever they happen to
    agree: with three seeds and little variance from the images, 95 % intervals cover 92 %. Without the square they cover 94
    to 96 %. Two seeds agree by chance more often still: they cover 92 % with the ratio, and at least 95 % with its square root
    (all by simulation).
    """
    return (n - 1) * (variance / between) ** (0.5 if n == 2 else 1.0) if between else math.inf


def _image_variance(replicates: Sequence[np.ndarray]) -> float | None:
    """Return the variance that the images add to a mean over seeds, beyond what the spread between seeds already contains.

    On other images each seed's value moves by a part that all seeds share and by a part of its own. The second is contained
    in the variance between seeds; counting it here too would make the interval too wide. With one seed the two parts cannot
    be separated.

    Args:
        replicates: (B,) for each seed that has them; more seeds give a better estimate.
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
    residuals = table - table.mean(axis=0)
    residuals = residuals - residuals.mean(axis=1, keepdims=True)
    interaction = float((residuals**2).sum()) / ((len(table) - 1) * (table.shape[1] - 1))
    return max(shared - interaction / len(table), 0.0)


@dataclass(frozen=True)
class Look:
    """A test of a difference when it has `seeds` seeds; `number` counts from 1. Its p-values are multiplied by `factor`."""

    number: int
    seeds: int
    factor: float


def looks(planned: int) -> Iterator[Look]:
    """Yield the looks at which a difference is tested: with the planned seeds, and each time their number has doubled.

    Who adds seeds to an inconclusive claim and tests after each, up to 50, finds an effect in 8 to 31 of 100 cases where
    there is none. So the looks share the 5 %, which holds whatever they have in common (Bonferroni).
    """
    seeds, number, share = max(planned, 2), 1, FIRST_LOOK
    while number == 1 or seeds <= MAX_SEEDS:
        yield Look(number, seeds, 1 / share)
        share = (1 - FIRST_LOOK) / 2**number
        seeds, number = 2 * seeds, number + 1


def seeds_needed(current: Estimate, bound: float, family: float = 1.0, planned: int = 0) -> int | None:
    """Return how many seeds would put `bound` outside the interval if the mean and the variances stayed the same.

    With `planned` seeds it is the number of a look, at that look's level. None: the spread is unknown, or MAX_SEEDS are not
    enough because there are too few images.

    Args:
        family: the number of claims for which the interval must hold at once (Bonferroni), or Holm's factor of a single one.
    """
    if current.n < 2 or current.seed_variance is None:
        return None
    distance, spread = abs(current.mean - bound), current.seed_variance * current.n
    images = current.image_variance or 0.0

    def suffices(n: int, factor: float) -> bool:
        return distance > _test_width((1 - LEVEL) / 2 / family / factor, n, spread / n, images)

    further = ((look.seeds, look.factor) for look in looks(planned) if look.seeds > current.n)
    numbers = further if planned else ((n, 1.0) for n in range(2, MAX_SEEDS + 1))
    return next((n for n, factor in numbers if suffices(n, factor)), None)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values so that they hold for the whole family at once (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, p_values[i] * (len(p_values) - rank)))
        adjusted[i] = highest
    return adjusted


def control_half_width(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return sqrt(n) times the half-width of a 95 % interval for a mean over n seeds, estimated from an A/A control.

    `first` and `second` are the values of one row with two sets of seeds. A difference of two such means has sqrt(2) times
    that half-width.
    """
    n, m = len(first), len(second)
    if min(n, m) < 2:
        return None
    pooled = ((n - 1) * np.var(first, ddof=1) + (m - 1) * np.var(second, ddof=1)) / (n + m - 2)
    return float(_t_quantile(n + m - 2) * math.sqrt(pooled))


def _test_width(p: float, n: int, seeds: float, images: float) -> float:
    """Return how far a mean must be from a true value for a one-sided p-value of `p`: root of t^2 `seeds` + z^2 `images`.

    The true error is at most `p` at every level: the tail of a squared normal is convex. The formula of the interval is good
    at 95 % only. At the levels of a family of 8 it would decide true nulls in 11 of 100 families of claims (three seeds).
    """
    from scipy.special import ndtri, stdtrit

    return math.hypot(float(stdtrit(n - 1, p)) * math.sqrt(seeds), float(ndtri(p)) * math.sqrt(images))


def _t_quantile(df: float) -> float:
    """Return the half-width of a two-sided 95 % interval in standard errors."""
    from scipy.special import stdtrit

    return float(stdtrit(df, 1 - (1 - LEVEL) / 2))

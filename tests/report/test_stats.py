"""Intervals and what follows from them."""

import functools
import math

import numpy as np
import pytest
from scipy import stats

from fpn_ablate.report.collate.stats import Estimate, control_half_width, estimate, holm, looks, seeds_needed


@functools.cache
def bank(images, replicates, size=50):
    generator = np.random.default_rng(7)
    positions = generator.integers(images, size=(size * replicates, images)) + images * np.arange(size * replicates)[:, None]
    counts = np.bincount(positions.ravel(), minlength=size * replicates * images)
    return counts.reshape(size, replicates, images).astype(float)


def times_drawn(images, replicates, generator):
    """Return how often each image is in each replicate: (B, I), one of 50 tables of draws.

    Drawing anew takes half of a simulation's time, and the report draws the same images for every run, too.
    """
    tables = bank(images, replicates)
    return tables[generator.integers(len(tables))]


def simulated(seeds=3, images=200, between=0.004, shared=0.05, own=0.05, mean=0.0, generator=None, replicates=200):
    """({seed: metric}, {seed: the metric on drawn images}) of a metric that is a ratio of sums over images, as recall is."""
    generator = generator or np.random.default_rng(0)
    objects = generator.poisson(6, images) + 1
    values = mean + generator.normal(0, between, seeds)[:, None]
    values = values + generator.normal(0, shared, images) + generator.normal(0, own, (seeds, images))
    times = times_drawn(images, replicates, generator)
    drawn = (times @ (values * objects).T / (times @ objects)[:, None]).T
    return dict(enumerate((values * objects).sum(axis=1) / objects.sum())), dict(enumerate(drawn))


def test_without_replicates_it_is_students_interval():
    values = [0.41, 0.44, 0.39, 0.47]
    found = estimate(dict(enumerate(values)))
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.std == pytest.approx(np.std(values, ddof=1)) and found.df == 3
    assert found.p_above(0.4) == pytest.approx(stats.ttest_1samp(values, 0.4, alternative="greater").pvalue)
    assert found.p_below(0.5) == pytest.approx(stats.ttest_1samp(values, 0.5, alternative="less").pvalue)


def test_one_seed_has_the_images_alone_and_decides_nothing():
    values, drawn = simulated(seeds=1)
    found = estimate(values, drawn)
    assert found.half_width == pytest.approx(stats.norm.ppf(0.975) * drawn[0].std(ddof=1))
    assert found.p_above(-1.0) == 1.0 == found.p_below(1.0)


@pytest.mark.parametrize("values", [{}, {0: None, 1: math.nan, 2: math.inf}])
def test_nothing_defined_is_nothing(values):
    assert estimate(values, {0: np.ones(5)}) == Estimate(0)
    assert estimate(values).half_width is None


def test_undefined_values_are_left_out_and_counted_out():
    assert estimate({0: 1.0, 1: None, 2: math.nan, 3: 2.0}) == estimate({0: 1.0, 3: 2.0})


def test_a_seed_without_replicates_does_not_hide_what_the_images_do():
    """Of the others the shared part is estimated all the same; of one alone it holds that seed's own as well."""
    values, drawn = simulated(seeds=4, images=200, replicates=500)
    whole = estimate(values, drawn).image_variance
    some = estimate(values, {seed: drawn[seed] for seed in (0, 2, 3)}).image_variance
    one = estimate(values, {0: drawn[0]}).image_variance
    assert some == pytest.approx(whole, rel=0.35) and one > whole
    assert estimate(values, {}) == estimate(values)


def test_degrees_of_freedom_are_those_of_the_seeds_where_the_images_add_nothing_and_more_where_they_do():
    values = {0: 1.0, 1: 2.0, 2: 4.0}
    between = np.var([1.0, 2.0, 4.0], ddof=1) / 3
    still = {seed: np.array([value, value]) for seed, value in values.items()}
    assert estimate(values, still).df == 2
    moved = {seed: value + np.array([-1.0, 1.0]) for seed, value in values.items()}  # a variance of 2, the same for all seeds
    assert estimate(values, moved).df == pytest.approx(2 * (between + 2) / between)
    between, pair = 0.25, {seed: values[seed] + np.array([-1.0, 1.0]) for seed in (0, 1)}
    assert estimate({0: 1.0, 1: 2.0}, pair).df == pytest.approx(math.sqrt((between + 2) / between))


def test_replicates_in_which_a_size_does_not_occur_are_left_out():
    values, drawn = simulated()
    cut = {seed: np.append(line, math.nan) for seed, line in drawn.items()}
    assert estimate(values, cut) == estimate(values, drawn)


def test_images_widen_the_interval_and_their_own_part_is_not_counted_twice():
    values, drawn = simulated(between=0.0, shared=0.0, own=0.3)
    found = estimate(values, drawn)
    assert found.image_variance < 0.5 * found.seed_variance  # what the images do to each seed alone is the spread between seeds
    values, drawn = simulated(between=0.0, shared=0.3, own=0.0)
    found = estimate(values, drawn)
    assert found.image_variance == pytest.approx(np.mean(list(drawn.values()), axis=0).var(ddof=1), rel=1e-6)
    assert found.image_variance > 100 * found.seed_variance


def test_the_order_of_seeds_does_not_matter():
    values, drawn = simulated()
    backwards = dict(reversed(values.items())), dict(reversed(drawn.items()))
    assert estimate(*backwards).half_width == pytest.approx(estimate(values, drawn).half_width)


def test_holm_is_that_of_scipys_neighbours():
    p = [0.01, 0.04, 0.03, 0.005]
    # Holm (1979): sorted, times 4, 3, 2, 1, made monotone.
    assert holm(p) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.7, 0.9]) == [1.0, 1.0]


def test_as_many_seeds_as_are_said_to_be_needed_put_the_bound_outside():
    values = {seed: 1.0 + 0.8 * (-1) ** seed for seed in range(4)}
    found = estimate(values)
    assert found.low < 0.0
    needed = seeds_needed(found, 0.0)
    spread = found.std
    halves = {n: stats.t.ppf(0.975, n - 1) * spread / math.sqrt(n) for n in (needed - 1, needed)}
    assert halves[needed] < 1.0 <= halves[needed - 1]


def test_no_number_of_seeds_makes_up_for_too_few_images():
    values, drawn = simulated(shared=0.5, mean=0.01)
    assert seeds_needed(estimate(values, drawn), 0.0) is None
    assert seeds_needed(Estimate(1, 0.3, 0.1), 0.0) is None


def test_equal_rows_stay_below_the_noise_floor_in_95_of_100_cases():
    generator = np.random.default_rng(0)
    pairs = generator.normal(0, 0.7, (4000, 2, 3))
    below = [abs(a.mean() - b.mean()) < control_half_width(a, b) * math.sqrt(2 / 3) for a, b in pairs]
    assert 0.935 < np.mean(below) < 0.965
    assert control_half_width([1.0], [1.0, 2.0]) is None


def test_no_spread_at_all_decides_without_dividing_by_it():
    found = estimate({0: 2.0, 1: 2.0})
    assert found.half_width == 0 and found.low == found.high == 2.0
    assert (found.p_above(1.9), found.p_above(2.0), found.p_below(2.1)) == (0.0, 1.0, 0.0)


@pytest.mark.parametrize("planned", [1, 2, 3, 5, 2000])
def test_the_looks_share_5_percent(planned):
    found = list(looks(planned))
    assert [look.seeds for look in found] == [max(planned, 2) * 2**k for k in range(len(found))]
    assert [look.number for look in found] == list(range(1, len(found) + 1))
    assert found[0].factor == 1.25 and sum(0.05 / look.factor for look in found) < 0.05
    assert 500 < found[-1].seeds <= 2000


def test_a_look_that_is_said_to_be_needed_is_the_first_that_would_tell():
    values = {seed: 1.0 + 0.8 * (-1) ** seed for seed in range(4)}
    spread = estimate(values).std
    needed = seeds_needed(estimate(values), 0.0, planned=4)
    p = {look.seeds: look.factor * 2 * stats.t.sf(math.sqrt(look.seeds) / spread, look.seeds - 1) for look in looks(4)}
    assert needed == next(n for n in p if n > 4 and p[n] < 0.05)

"""What the intervals promise, on simulated rows whose true values are known."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats
from test_stats import simulated, times_drawn

from fpn_ablate.report.collate.cells import Cell, contrast
from fpn_ablate.report.collate.claims import judge
from fpn_ablate.report.collate.compare import Comparison
from fpn_ablate.report.collate.definition import Definition, Metric
from fpn_ablate.report.collate.stats import estimate, looks
from fpn_ablate.report.collate.table import Claim

REPETITIONS = 1000
# Standard deviations between seeds, of images for all seeds alike, and of images for each seed; of the mean they are about
# 1, 1/14 and 1/14 of that. From "seeds are all" to "images are all".
WORLDS = [(0.006, 0.0, 0.0), (0.006, 0.1, 0.05), (0.002, 0.1, 0.1), (0.0, 0.1, 0.1), (0.004, 0.05, 0.02)]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("seeds", [2, 3, pytest.param(5, marks=pytest.mark.slow)])
def test_95_percent_intervals_cover_the_truth_in_93_to_97_percent(world, seeds):
    """Those of two seeds in at least 94 percent, and more where the images matter as much as the seeds."""
    generator = np.random.default_rng(0)
    covered, repetitions = 0, 2 * REPETITIONS  # 94 percent is a point below the truth, two deviations of so many
    for _ in range(repetitions):
        found = estimate(*simulated(seeds, 100, *world, mean=0.3, generator=generator))
        covered += found.low <= 0.3 <= found.high
    assert (0.94, 0.93)[seeds > 2] <= covered / repetitions <= (0.99, 0.97)[seeds > 2]


def test_percentiles_over_three_seeds_would_not():
    """Why the seeds are not drawn: the interval of the plain bootstrap misses a quarter of the time."""
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        _, drawn = simulated(3, 100, *WORLDS[0], generator=generator)
        picked = generator.integers(3, size=(200, 3))
        means = np.stack(list(drawn.values()))[picked, np.arange(200)[:, None]].mean(axis=1)
        low, high = np.percentile(means, [2.5, 97.5])
        covered += low <= 0 <= high
    assert covered / 300 < 0.85


def rows_of(effect, generator, names=("a", "b", "c"), seeds=3, images=100, between=0.5):
    """Rows on the same images, drawn alike, with seeds and a way with images of their own; those after the first are `effect`
    points better."""
    objects = generator.poisson(6, images) + 1
    hard = generator.normal(0, 2.0, images)
    times = times_drawn(images, 200, generator)
    found = {}
    for number, name in enumerate(names):
        way = generator.normal(0, 1.0, images) + effect * (number > 0)
        values = 50 + generator.normal(0, between, seeds)[:, None] + hard + way + generator.normal(0, 2.0, (seeds, images))
        drawn = (times @ (values * objects).T / (times @ objects)[:, None]).T
        cells = Cell(dict(enumerate((values * objects).sum(axis=1) / objects.sum())), None, dict(enumerate(drawn)))
        finished = [{"seed": seed} for seed in range(seeds)]
        found[name] = SimpleNamespace(row=name, seeds=tuple(range(seeds)), cells={"AP": cells}, finished=finished)
    return found


def verdicts(effect, bounds, repetitions=REPETITIONS):
    generator = np.random.default_rng(1)
    definition = Definition(table="t", title="", facts=(), metrics=(Metric(key="AP"),))
    claims = [Claim(table="t", text="", metric="AP", plus=[plus], minus=["a"], **bounds) for plus in ("b", "c")]
    words = []
    for _ in range(repetitions):
        comparison = Comparison(definition, rows_of(effect, generator))
        words.append([verdict.verdict for verdict in judge(claims, comparison)])
    return np.array(words)


@pytest.mark.parametrize("seeds", [3, 5])
def test_intervals_of_paired_differences_cover_the_truth_in_93_to_97_percent(seeds):
    generator = np.random.default_rng(3)
    covered = 0
    for _ in range(REPETITIONS):
        rows = rows_of(1.5, generator, "ab", seeds)
        found = contrast([rows["b"].cells["AP"]], [rows["a"].cells["AP"]], range(seeds)).ours
        covered += found.low <= 1.5 <= found.high
    assert 0.93 <= covered / REPETITIONS <= 0.97


@pytest.mark.slow  # the coverage of intervals, which decides it, is tested above
def test_without_an_effect_fewer_than_5_percent_of_families_say_supported():
    words = verdicts(0.0, {"above": 0.0})
    assert (words == "supported").any(axis=1).mean() < 0.05


@pytest.mark.slow  # the coverage of intervals, which decides it, is tested above
def test_at_the_edge_of_equivalence_fewer_than_5_percent_say_supported():
    words = verdicts(2.0, {"above": -2.0, "below": 2.0}, 200)
    assert (words == "supported").any(axis=1).mean() < 0.05


def test_a_large_effect_is_found_and_a_wrong_claim_contradicted():
    assert (verdicts(8.0, {"above": 0.0}, 60) == "supported").mean() > 0.9
    assert (verdicts(8.0, {"below": 0.0}, 60) == "contradicted").mean() > 0.9


def test_pairing_removes_what_rows_share():
    """Rows on the same images, drawn alike, against the sum of their own variances."""
    generator = np.random.default_rng(2)
    values, drawn = simulated(4, 100, 0.1, 5.0, 0.1, generator=generator)
    other = {seed: value + 1 for seed, value in values.items()}, {seed: line + 1 for seed, line in drawn.items()}
    found = contrast([Cell(other[0], None, other[1])], [Cell(values, None, drawn)], sorted(values))
    assert found.ours.mean == pytest.approx(1) and found.variance_removed == pytest.approx(1)


# Looking again
MAX = 50  # seeds that are added at most


def share_of_false_verdicts(planned, images, claims, at, repetitions=4000):
    """The share of tables of true nulls in which any claim gets a verdict in any of the tests `at` ({seeds: factor of p}).

    The claims are differences from one baseline. `images` is the variance of the images over that of a seed. By the formulas
    of docs/pages/statistics.md, with the variance of the images known.
    """
    generator = np.random.default_rng(4)
    rows = generator.normal(0, 1, (repetitions, claims + 1, MAX))
    rows += generator.normal(0, images**0.5, (repetitions, claims + 1, 1))
    differences = rows[:, 1:] - rows[:, :1]
    false = np.zeros(repetitions, bool)
    for n, factor in at.items():
        mean, seeds = differences[..., :n].mean(-1), differences[..., :n].var(-1, ddof=1) / n
        level = 0.05 / claims / factor  # Holm's procedure decides nothing unless one claim passes this
        width = stats.t.isf(level / 2, n - 1) ** 2 * seeds + stats.norm.isf(level / 2) ** 2 * 2 * images
        false |= (mean**2 > width).any(axis=1)
    return false.mean()


@pytest.mark.parametrize("images", [0.0, 0.005, 0.02, 0.1, 0.5, 2.0])
@pytest.mark.parametrize("claims", [1, 8])
@pytest.mark.parametrize("planned", [2, 3, 5])
def test_who_follows_the_advice_to_50_seeds_gets_a_false_verdict_in_fewer_than_5_percent(planned, claims, images):
    at = {look.seeds: look.factor for look in looks(planned) if look.seeds <= MAX}
    assert share_of_false_verdicts(planned, images, claims, at) < 0.05


def test_without_looks_it_would_be_more_than_twice_that():
    assert share_of_false_verdicts(3, 0.1, 1, dict.fromkeys(range(3, MAX + 1), 1.0)) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("between", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("names", ["ab", "abcdefghi"])
def test_verdicts_on_true_nulls_are_fewer_than_5_percent_whatever_the_number_of_seeds(between, names):
    """By the report's own verdicts: one claim, and a family of 8, after each seed that could change them."""
    generator = np.random.default_rng(5)
    definition = Definition(table="t", title="", facts=(), metrics=(Metric(key="AP"),), seeds=(0, 1, 2))
    claims = [Claim(table="t", text="", metric="AP", plus=[name], minus=["a"], above=0.0) for name in names[1:]]
    counts, repetitions = [look.seeds for look in looks(3) if look.seeds <= MAX], 4000 if len(names) == 2 else 300
    false = 0
    for _ in range(repetitions):
        rows = rows_of(0.0, generator, names, counts[-1], between=between)
        false += any(
            verdict.verdict != "inconclusive"
            for count in counts
            for verdict in judge(claims, Comparison(definition, {name: _first(row, count) for name, row in rows.items()}))
        )
    assert false / repetitions < 0.05


def _first(row, count):
    cell = row.cells["AP"]
    values, drawn = ({seed: of[seed] for seed in range(count)} for of in (cell.values, cell.resampled))
    cells = {"AP": Cell(values, None, drawn)}
    return SimpleNamespace(row=row.row, seeds=tuple(range(count)), cells=cells, finished=row.finished[:count])

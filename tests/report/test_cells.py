"""Differences between cells: the same arithmetic for values, for their replicates and for what is published."""

import numpy as np
import pytest

from fpn_ablate.report.collate.cells import Cell, contrast, subtract_metric


def cell(seed, published=None, seeds=range(3)):
    generator = np.random.default_rng(seed)
    values = dict(zip(seeds, generator.uniform(10, 90, len(seeds)).tolist(), strict=True))
    return Cell(values, published, {s: value + generator.normal(0, 1, 20) for s, value in values.items()})


def test_an_interaction_is_one_of_values_replicates_and_published_figures_alike():
    a, b, c, d = (cell(k, float(10 * k)) for k in range(1, 5))
    found = contrast([a, d], [b, c], range(3), scale=2)

    def by_hand(pick):
        return (pick(d) - pick(c)) - (pick(b) - pick(a))

    for s in range(3):
        assert found.values[s] == pytest.approx(by_hand(lambda cell, s=s: cell.values[s]))
        np.testing.assert_allclose(found.resampled[s], by_hand(lambda cell, s=s: cell.resampled[s]))
    assert found.published == pytest.approx(by_hand(lambda cell: cell.published)) and found.squared_weights == pytest.approx(4)


def test_variances_of_independent_rows_add_up_by_their_weights():
    a, b, c = (cell(k) for k in range(3))
    found = contrast([a], [b, c], range(3))
    assert found.unpaired_variance == pytest.approx(
        a.ours.standard_error**2 + (b.ours.standard_error**2 + c.ours.standard_error**2) / 4
    )


def test_a_seed_without_a_value_or_replicates_in_one_row_has_none_in_the_difference():
    a, b = cell(1), cell(2)
    b.values[1] = None
    del b.resampled[2]
    found = contrast([a], [b], range(3))
    assert found.values[1] is None and set(found.resampled) == {0, 1} and found.ours.n == 2


def test_one_metric_beyond_another_is_taken_within_the_run():
    a, b = cell(1, 5.0), cell(2, 2.0)
    found = subtract_metric(a, b)
    assert found.values == {s: a.values[s] - b.values[s] for s in range(3)} and found.published == 3.0
    np.testing.assert_array_equal(found.resampled[2], a.resampled[2] - b.resampled[2])

"""Which masks pictures show."""

import numpy as np

from fpn_ablate.evaluation.display import closest
from fpn_ablate.utils import rle


def strips(*columns):
    """Masks of 10 x 20 pixels from one column to another."""
    masks = np.zeros((len(columns), 10, 20), bool)
    for mask, (first, last) in zip(masks, columns, strict=True):
        mask[:, first:last] = True
    return rle.encode(masks)


def test_each_object_has_the_mask_that_overlaps_it_most():
    objects = strips((0, 4), (5, 9), (5, 10), (18, 20))
    masks = strips((12, 15), (5, 8), (0, 3), (0, 5), (6, 7))
    assert closest(objects, masks, (10, 20)) == [1, 3]  # one for two objects, none for the last
    assert closest([], masks, (10, 20)) == closest(objects, [], (10, 20)) == []

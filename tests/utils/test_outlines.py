"""Outlines of masks hold the pixels of the mask: parts, holes and the image's border."""

import numpy as np
import pytest
from matplotlib.path import Path

from fpn_ablate.utils import rle
from fpn_ablate.utils.outlines import outlines, svg_path

SIZE = (40, 60)
Y, X = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
DISC = (X - 30) ** 2 + (Y - 18) ** 2 < 15**2
MASKS = {
    "disc": DISC,
    "ring": DISC & ((X - 28) ** 2 + (Y - 18) ** 2 > 8**2),
    "parts": ((X < 9) & (Y > 25)) | (X > 50) | ((abs(X - 25) < 4) & (abs(Y - 20) < 6)),
    "everything": np.ones(SIZE, bool),
    "pixel": (X == 7.5) & (Y == 3.5),
    "nothing": np.zeros(SIZE, bool),
}


def inside(polygons):
    """Pixels whose centre lies within an odd number of polygons."""
    centres, result = np.stack([X.ravel(), Y.ravel()], 1), np.zeros(SIZE, bool)
    for polygon in polygons:
        result ^= Path(polygon, closed=True).contains_points(centres).reshape(SIZE)
    return result


@pytest.mark.parametrize("name", MASKS)
def test_an_outline_encloses_the_pixels_of_its_mask(name):
    mask = MASKS[name]
    (counts,) = rle.encode(mask[None])
    exact = outlines(counts, SIZE, tolerance=0)
    np.testing.assert_array_equal(inside(exact), mask)
    short = outlines(counts, SIZE)
    assert len(short) == len(exact) and all(len(line) <= 40 for line in short)
    assert (inside(short) != mask).sum() <= 0.08 * mask.sum()


def test_a_hole_runs_the_other_way():
    polygons = outlines(rle.encode(MASKS["ring"][None])[0], SIZE)
    areas = [(line[:-1, 0] * line[1:, 1] - line[1:, 0] * line[:-1, 1]).sum() / 2 for line in polygons]
    assert len(areas) == 2 and areas[0] * areas[1] < 0
    assert abs(sum(areas)) == pytest.approx(MASKS["ring"].sum(), rel=0.05)


def test_a_path_has_a_part_for_each_polygon():
    assert svg_path([np.array([[1, 2], [30.04, 2], [1, 2.46], [1, 2]])] * 2) == "M1 2 30 2 1 2.5z" * 2
    assert svg_path([]) == ""

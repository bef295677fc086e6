"""Outlines of masks for pictures: closed polygons around parts and holes, a few dozen corners in place of all pixels."""

import numpy as np
from contourpy import contour_generator

from fpn_ablate.utils import rle


def outlines(counts: bytes, size: rle.Size, tolerance: float = 0.7) -> list[np.ndarray]:
    """Trace a mask (`utils.rle`) of an image of `size`: polygons (N, 2) of x and y in its pixels, last point = first.

    They run around holes the other way. Points less than `tolerance` pixels from the polygon, and less than a quarter of the
    mask's shorter side, are left out.

    Raises:
        ValueError: the mask is damaged.
    """
    (bitmap,) = rle.decode([counts], size)  # first: it refuses damaged masks
    x, y, width, height = rle.boxes([counts], np.array([size]))[0].astype(int).tolist()
    bitmap = np.pad(bitmap[y : y + height, x : x + width], 1).astype(float)
    tolerance = min(tolerance, min(width, height) / 4)
    lines = contour_generator(z=bitmap).lines(0.5)
    origin = np.array([x - 0.5, y - 0.5])  # the centre of the padding's first pixel
    return [_simplified(line + origin, tolerance) for line in lines]


def svg_path(polygons: list[np.ndarray]) -> str:
    """Format polygons as the `d` of an SVG path, to a tenth of a pixel."""
    return "".join(f"M{' '.join(f'{x:g} {y:g}' for x, y in line[:-1].round(1).tolist())}z" for line in polygons)


def _simplified(line: np.ndarray, tolerance: float) -> np.ndarray:
    """Leave out points of a line (Ramer, Douglas and Peucker)."""
    keep = np.zeros(len(line), bool)
    keep[[0, -1]] = True
    pending = [(0, len(line) - 1)]
    while pending:
        first, last = pending.pop()
        offsets, (dx, dy) = line[first + 1 : last] - line[first], line[last] - line[first]
        length = np.hypot(dx, dy)
        across = np.abs(offsets[:, 0] * dy - offsets[:, 1] * dx) / length if length else np.hypot(*offsets.T)
        if across.size and across.max() > tolerance:
            farthest = first + 1 + int(across.argmax())
            keep[farthest] = True
            pending += [(first, farthest), (farthest, last)]
    return line[keep]

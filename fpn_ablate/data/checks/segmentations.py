"""Read the masks of a COCO instances file: polygons and run lengths, checked and converted to compressed run lengths.

pycocotools trusts its input: it reads four numbers as a box, writes beyond its memory for broken run lengths, and takes memory
by the length of a polygon's lines. So everything is checked before it gets there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from fpn_ablate.utils import rle
from fpn_ablate.utils.errors import short_repr
from fpn_ablate.utils.rle import Size

ROUNDING, NOISE = 1.0, 1e-3  # pixels, as for boxes: `examine`
LONGEST, MOST = 10**6, 2**31  # pixels of a side, and in all: pycocotools counts in 32 bits
FAR = 0.5  # IoU of a mask's box and its object's, both a pixel wider; COCO's own are above 0.7


@dataclass(frozen=True, slots=True)
class Flawed:
    """A mask with a fault: its kind (`findings.KINDS`), the value found, and the usable rest, empty if no pixel is left."""

    kind: str
    value: str
    counts: bytes = b""


class MaskReader:
    """Convert each mask as soon as it is parsed if its image stands before it, since polygons are most of a COCO file."""

    def __init__(self) -> None:
        self._sizes: dict[int, Size] = {}
        self._used: dict[int, Size] = {}

    def __call__(self, entry: dict[str, Any]) -> None:
        """Read an object of the file: note an image's size, or replace an annotation's `segmentation`."""
        key = entry.get("image_id")
        if "image_id" not in entry:
            values = tuple(entry.get(name) for name in ("id", "height", "width"))
            if all(type(value) is int for value in values):
                self._sizes[values[0]] = values[1:]
        elif type(key) is int and key in self._sizes and "segmentation" in entry:
            size = self._used.setdefault(key, self._sizes[key])
            entry["segmentation"] = to_mask(entry["segmentation"], size)

    def knew(self, image_ids: np.ndarray, sizes: np.ndarray) -> bool:
        """Return whether masks were read in the sizes (N, 2) of their images, and not of what else has an id and a size."""
        of_images = zip(image_ids.tolist(), map(tuple, sizes.tolist()), strict=True)
        return all(self._used.get(key, size) == size for key, size in of_images)


def to_mask(segmentation: Any, size: Size) -> bytes | Flawed:
    """Convert the `segmentation` of an object in an image of `size` to run lengths. Never raises on bad content."""
    if not segmentation and segmentation in (None, [], {}):
        return Flawed("mask-missing", f"`segmentation` is {short_repr(segmentation)}")
    if max(size) > LONGEST or not 0 < size[0] * size[1] < MOST:
        return Flawed("image-size", f"annotated as {size[1]}x{size[0]}")
    if isinstance(segmentation, dict):
        return _from_rle(segmentation, size)
    if not isinstance(segmentation, list) or not all(isinstance(part, list) for part in segmentation):
        return Flawed("wrong-type", f"`segmentation` is {short_repr(segmentation)}, neither a list of polygons nor run lengths")
    return _from_polygons(segmentation, size)


def _from_rle(segmentation: dict[str, Any], size: Size) -> bytes | Flawed:
    if segmentation.get("size") != list(size):
        found = short_repr(segmentation["size"]) if "size" in segmentation else "missing"
        return Flawed("mask-size", f"`size` is {found}, of an image of height {size[0]} and width {size[1]}")
    counts = segmentation.get("counts")
    if isinstance(counts, list) and {*map(type, counts)} <= {int}:
        runs = counts
    elif isinstance(counts, str) and (numbers := rle.runs(counts)) is not None:
        runs = numbers
    else:
        return Flawed("mask-counts", f"`counts` is {short_repr(counts)}: no run lengths")
    if any(run < 0 for run in runs) or sum(runs) != size[0] * size[1]:
        return Flawed(
            "mask-counts", f"{len(runs)} runs sum to {short_repr(sum(runs))}, in an image of {size[0] * size[1]} pixels"
        )
    if not any(runs[1::2]):
        return Flawed("mask-empty", "`counts` has no pixel of the object")
    return rle.from_runs(runs, size)


def _from_polygons(polygons: Sequence[Any], size: Size) -> bytes | Flawed:
    """Rasterise the sound polygons of an object; of several faults the worst is told."""
    sound, flaws, over = [], [], 0.0
    for n, polygon in enumerate(polygons, start=1):
        where = f"polygon {n} of {len(polygons)}"
        if not {*map(type, polygon)} <= {int, float}:
            return Flawed("wrong-type", f"{where} is {short_repr(polygon)}, no list of numbers")
        if not _is_finite(polygon):
            return Flawed("non-finite", f"{where} is {short_repr(polygon)}")
        if len(polygon) < 6 or len(polygon) % 2:
            flaws.append(Flawed("mask-points", f"{where} has {len(polygon)} numbers: three points or more have x and y each"))
            continue
        over = max(over, _excess(polygon, size))
        sound.append(_near(polygon, size) if over > ROUNDING else polygon)
    counts = b""
    if sound:
        parts = coco_mask.frPyObjects(sound, *size)
        areas = coco_mask.area(parts) if len(parts) < 256 else rle.coco_areas(parts)
        if areas.any():
            counts = parts[0]["counts"] if len(parts) == 1 else coco_mask.merge(parts)["counts"]
        if over > ROUNDING:
            flaws.append(Flawed("mask-outside", f"a polygon leaves the image of {size[1]}x{size[0]} by {over:g} px"))
        elif not counts:
            flaws.append(Flawed("mask-empty", f"no pixel is inside {short_repr(sound)}"))
        elif over > NOISE:
            flaws.append(Flawed("mask-rounded", f"a polygon leaves the image of {size[1]}x{size[0]} by {over:g} px"))
        elif crossing := [part for part, area in zip(sound, areas.tolist(), strict=True) if _crosses_itself(part, area)]:
            flaws.append(Flawed("mask-crossing", f"the lines of {short_repr(crossing[0])} cross"))
    return Flawed(flaws[0].kind, flaws[0].value, counts) if flaws else counts


def _is_finite(polygon: Sequence[float]) -> bool:
    try:
        return math.isfinite(sum(map(abs, polygon)))
    except OverflowError:  # an integer that no float holds
        return False


def _excess(polygon: Sequence[float], size: Size) -> float:
    """Return how far a polygon exceeds its image, in pixels; negative inside."""
    x, y = polygon[::2], polygon[1::2]
    return max(-min(x), -min(y), max(x) - size[1], max(y) - size[0])


def _near(polygon: Sequence[float], size: Size) -> list[float]:
    """Move points that lie more than a side outside of the image to that distance, which bounds the memory for its lines."""
    sides = (size[1], size[0])
    return [min(max(value, -sides[n % 2]), 2 * sides[n % 2]) for n, value in enumerate(polygon)]


def _crosses_itself(polygon: Sequence[float], area: float) -> bool:
    """Compare the pixels that are filled with the area that the points enclose by their order, where loops cancel.

    They differ by less than the outline's length in pixels where no lines cross.
    """
    x, y = polygon[::2], polygon[1::2]
    following = list(zip(x, y, x[1:] + x[:1], y[1:] + y[:1], strict=True))
    difference = abs(area - abs(sum(a * d - c * b for a, b, c, d in following)) / 2)
    if difference <= max(x) - min(x) + max(y) - min(y):  # half of the shortest outline around these points
        return False
    return difference > sum(math.hypot(c - a, d - b) for a, b, c, d in following)


def far_from_boxes(masks: Sequence[bytes], sizes: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return (M,) bool: the masks, of images of `sizes` (M, 2), that lie elsewhere than the objects' boxes (M, 4) XYWH."""
    x, y, w, h = rle.boxes(masks, sizes).T
    x2, y2, w2, h2 = boxes.T
    with np.errstate(over="ignore", invalid="ignore"):
        shared = (np.minimum(x + w, x2 + w2) - np.maximum(x, x2) + 2).clip(min=0)
        shared = shared * (np.minimum(y + h, y2 + h2) - np.maximum(y, y2) + 2).clip(min=0)
        union = (w + 2) * (h + 2) + (w2 + 2) * (h2 + 2) - shared
        return np.array([bool(mask) for mask in masks], bool) & (shared < FAR * union)

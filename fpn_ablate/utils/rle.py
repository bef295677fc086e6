"""Masks as COCO's compressed run lengths: a few hundred bytes each, whatever the size of the image.

G masks of H x W pixels. A mask is the `counts` (bytes) of pycocotools; its size (H, W) is kept beside it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

Size = tuple[int, int]  # height, width


def encode(masks: np.ndarray) -> list[bytes]:
    """Encode bitmaps (G, H, W), bool or 0 and 1."""
    columns = np.asfortranarray(masks.transpose(1, 2, 0), dtype=np.uint8)
    return [rle["counts"] for rle in coco_mask.encode(columns)]


def decode(counts: Sequence[bytes], size: Size) -> np.ndarray:
    """Decode masks to bitmaps (G, H, W) bool."""
    if not counts:
        return np.zeros((0, *size), bool)
    return coco_mask.decode(coco_objects(counts, size)).transpose(2, 0, 1).astype(bool)


def areas(counts: Sequence[bytes], size: Size) -> np.ndarray:
    """Count the pixels of masks: (G,) float64."""
    return coco_mask.area(coco_objects(counts, size)).astype(float) if counts else np.zeros(0)


def from_polygons(polygons: Sequence[Sequence[float]], size: Size) -> bytes:
    """Rasterise the polygons of one object, [x, y, x, y, ...] each, to the union of their insides."""
    return coco_mask.merge(coco_mask.frPyObjects(list(polygons), *size))["counts"]


def coco_objects(counts: Sequence[bytes], size: Size) -> list[dict[str, Any]]:
    """Return masks as pycocotools takes them."""
    return [{"size": list(size), "counts": rle} for rle in counts]

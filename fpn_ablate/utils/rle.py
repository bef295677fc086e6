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
    return coco_areas(coco_objects(counts, size))


def iou(first: Sequence[bytes], second: Sequence[bytes], size: Size) -> np.ndarray:
    """Compute the IoU of G and P masks of one image: (G, P) float64."""
    if not first or not second:
        return np.zeros((len(first), len(second)))
    objects, others = coco_objects(first, size), coco_objects(second, size)
    return coco_mask.iou(others, objects, [0] * len(first)).T


def from_polygons(polygons: Sequence[Sequence[float]], size: Size) -> bytes:
    """Rasterise the polygons of one object, [x, y, x, y, ...] each, to the union of their insides."""
    return coco_mask.merge(coco_mask.frPyObjects(list(polygons), *size))["counts"]


def from_segmentation(segmentation: list[list[float]] | dict[str, Any], size: Size) -> bytes:
    """Convert a sound `segmentation` of a COCO file: polygons, or run lengths as a list of numbers or compressed."""
    if isinstance(segmentation, list):
        return from_polygons(segmentation, size)
    counts = segmentation["counts"]
    if isinstance(counts, list):
        return coco_mask.frPyObjects({"size": list(size), "counts": counts}, *size)["counts"]
    return counts.encode("ascii") if isinstance(counts, str) else counts


def coco_object(counts: bytes, size: Size) -> dict[str, Any]:
    """Return a mask as COCO's files hold it and pycocotools takes it."""
    return {"size": list(size), "counts": counts.decode("ascii")}


def coco_objects(counts: Sequence[bytes], size: Size) -> list[dict[str, Any]]:
    """Return masks as COCO's files hold them and pycocotools takes them."""
    return [coco_object(rle, size) for rle in counts]


def coco_areas(objects: Sequence[dict[str, Any]]) -> np.ndarray:
    """Count the pixels of masks that `coco_object` returns, of images of any size: (G,) float64."""
    # pycocotools 2.0 puts the number of masks into a byte, which NumPy 2 refuses.
    parts = [coco_mask.area(list(objects[n : n + 255])) for n in range(0, len(objects), 255)]
    return np.concatenate([*parts, np.zeros(0)])


def join(counts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Join masks for a file of arrays: all bytes (uint8), and the number of bytes of each mask."""
    return np.frombuffer(b"".join(counts), np.uint8), np.array([len(rle) for rle in counts], np.int64)


def split(joined: np.ndarray, lengths: np.ndarray) -> list[bytes]:
    """Undo `join`.

    Raises:
        ValueError: the lengths are not those of the bytes.
    """
    if (lengths < 0).any() or lengths.sum() != len(joined):
        raise ValueError(f"masks of {lengths.sum()} bytes in {len(joined)}")
    whole, ends = joined.tobytes(), np.cumsum(lengths).tolist()
    return [whole[end - length : end] for end, length in zip(ends, lengths.tolist(), strict=True)]

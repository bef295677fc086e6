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
        return from_runs(counts, size)
    return counts.encode("ascii") if isinstance(counts, str) else counts


def from_runs(runs: Sequence[int], size: Size) -> bytes:
    """Compress run lengths, down the columns, outside first; they must be positive or 0 and sum to the image's pixels.

    Runs of 0 but the first are merged away, since pycocotools' IoU stops where two masks have one at the same place.
    """
    merged: list[int] = []
    for n, run in enumerate(runs):
        if n % 2 != len(merged) % 2:  # the run between was 0
            merged[-1] += run
        elif run or not merged:
            merged.append(run)
    return coco_mask.frPyObjects({"size": list(size), "counts": merged}, *size)["counts"]


def runs(counts: str) -> list[int] | None:
    """Decompress run lengths; None if the text is none. Their sum, and whether they are negative, is the caller's to check.

    A number has 5 bits a character, the lowest first, with bit 5 where more follow and a sign; from the fourth on it is the
    difference from the last but one.
    """
    if not counts or not counts.isascii():
        return None
    values = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(values & 32 == 0)
    if values.min() < 0 or values.max() > 63 or values[-1] & 32:
        return None
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 7:  # more than 2^34
        return None
    shifts = 5 * (np.arange(len(values)) - np.repeat(starts, lengths))
    numbers = np.add.reduceat((values & 31) << shifts, starts) - ((values[ends] >> 4 & 1) << 5 * lengths)
    numbers[1::2], numbers[2::2] = np.cumsum(numbers[1::2]), np.cumsum(numbers[2::2])
    return numbers.tolist()


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


def boxes(counts: Sequence[bytes], sizes: np.ndarray) -> np.ndarray:
    """Return the boxes of masks of images of `sizes` (G, 2): (G, 4) float64, x, y, width, height; 0 without a pixel."""
    result = np.zeros((len(counts), 4))
    for n in range(0, len(counts), 63):  # for the reason that `coco_areas` gives: here the byte holds the number of sides
        pairs = zip(counts[n : n + 63], sizes[n : n + 63].tolist(), strict=True)
        result[n : n + 63] = coco_mask.toBbox([coco_object(mask or b"0", size) for mask, size in pairs])
    return result


def areas_of(counts: Sequence[bytes], sizes: np.ndarray) -> np.ndarray:
    """Count the pixels of masks in images of `sizes` (G, 2): (G,) float64."""
    return coco_areas([coco_object(rle, tuple(size)) for rle, size in zip(counts, sizes.tolist(), strict=True)])


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

"""Class-agnostic recall by COCO's rule, from the few pairs of a box and an object that can match at all.

COCO's evaluator goes through the boxes of an image from the best on, at each IoU threshold and for each range of areas, and
gives each the object that it overlaps most among those that are free. Crowd regions and objects outside the range take part as
well, but only boxes that no counted object wants go to them, so recall does not depend on them, and they are left out here.

I images, L limits, A ranges of areas, T IoU thresholds, M boxes, G objects.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

THRESHOLDS = np.linspace(0.5, 0.95, 10)
TOGETHER = 256  # images whose pairs are in memory at a time


@dataclass(frozen=True)
class Hits:
    """Of each image, by rising id: objects that the best boxes find, and all that there are.

    Attributes:
        ids: (I,).
        found: (I, L, A, T), for limits in rising order.
        objects: (I, A).
    """

    ids: np.ndarray
    found: np.ndarray
    objects: np.ndarray

    def recall(self) -> np.ndarray:
        """(L, A): the mean over thresholds of the recall over all images; NaN where there is no object."""
        objects = self.objects.sum(0)
        found = self.found.sum(0).mean(-1)
        return np.divide(found, objects, out=np.full(found.shape, np.nan), where=objects > 0)


def hits(
    truth: dict[str, Any],
    image_ids: np.ndarray,
    boxes: np.ndarray,
    scores: np.ndarray,
    areas: Sequence[tuple[float, float]],
    limits: Sequence[int],
) -> Hits:
    """What is found among the objects of `truth`, a COCO instances dictionary.

    Args:
        image_ids, boxes, scores: (M,), (M, 4) XYXY, (M,). What lies in images that `truth` does not declare is passed over; of
            equal scores the first comes first.
        areas: (smallest, largest) in square pixels, both included.
        limits: only the best so many boxes of an image count.
    """
    ids = np.unique(np.array([image["id"] for image in truth["images"]], dtype=np.int64))
    declared = set(ids.tolist())
    counted = [a for a in truth["annotations"] if not a.get("iscrowd") and a["image_id"] in declared]
    owner = np.searchsorted(ids, np.array([a["image_id"] for a in counted], dtype=np.int64))
    order = np.argsort(owner, kind="stable")
    owner, counted = owner[order], [counted[n] for n in order]
    xywh = np.array([a["bbox"] for a in counted], dtype=float).reshape(-1, 4)
    area = np.array([a.get("area", a["bbox"][2] * a["bbox"][3]) for a in counted], dtype=float)
    within = np.stack([(low <= area) & (area <= high) for low, high in areas], 1)  # (G, A)
    limits = sorted(limits)
    ranked, first = _ranked(ids, image_ids, scores, limits[-1])
    thresholds = np.arange(len(THRESHOLDS) + 1)[:, None] > np.arange(len(THRESHOLDS))  # (T + 1, T)
    reach = _masks(np.repeat(thresholds[:, None], len(areas), axis=1))
    found = np.zeros((len(ids), len(limits), len(areas), len(THRESHOLDS)), dtype=np.int64)
    for begin in range(0, len(ids), TOGETHER):
        images = range(begin, min(begin + TOGETHER, len(ids)))
        own = slice(*np.searchsorted(owner, (images.start, images.stop)))
        wanted = np.repeat(within[own, :, None], len(THRESHOLDS), axis=2)
        pairs = _pairs(images, owner, xywh, boxes, ranked, first)
        for number, left in enumerate(_match(pairs, _masks(wanted), reach, limits)):
            np.add.at(found, (owner[own], number), wanted & ~_bits(left, len(areas)))
    objects = np.zeros((len(ids), len(areas)), dtype=np.int64)
    np.add.at(objects, owner, within)
    return Hits(ids, found, objects)


def _ranked(ids: np.ndarray, image_ids: np.ndarray, scores: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the `most` best boxes of each image, image by image, best first; and where each image's begin, (I + 1,)."""
    order = np.lexsort((-scores, image_ids))
    own = image_ids[order]
    first, last = np.searchsorted(own, ids), np.searchsorted(own, ids, side="right")
    last = np.minimum(last, first + most)
    kept = [order[a:b] for a, b in zip(first, last, strict=True)]
    return np.concatenate([*kept, order[:0]]), np.concatenate([[0], np.cumsum(last - first)])


@dataclass(frozen=True)
class _Pairs:
    """Pairs of a box and an object that overlap enough for the lowest threshold, in the order of matching: box by box, images
    side by side; of a box's objects the one of the largest IoU first, of equal ones the last.

    Attributes:
        rank: of the box in its image.
        begins: does the pair begin a new box?
        objects: counted from the first of these images.
        reached: how many thresholds the IoU reaches.
    """

    rank: np.ndarray
    begins: list[bool]
    objects: list[int]
    reached: list[int]


def _pairs(
    images: range, owner: np.ndarray, xywh: np.ndarray, boxes: np.ndarray, ranked: np.ndarray, first: np.ndarray
) -> _Pairs:
    columns = []
    begin = np.searchsorted(owner, images.start)
    for n in images:
        low, high = np.searchsorted(owner, (n, n + 1))
        iou = _iou(xywh[low:high], boxes[ranked[first[n] : first[n + 1]]].astype(float))
        g, rank = np.nonzero(iou >= THRESHOLDS[0])
        columns.append((rank, np.full(len(g), n), g + (low - begin), iou[g, rank]))
    rank, image, g, iou = (np.concatenate(column) for column in zip(*columns, strict=True))
    order = np.lexsort((-g, -iou, image, rank))
    rank, image = rank[order], image[order]
    begins = np.ones(len(rank), dtype=bool)
    begins[1:] = (np.diff(rank) != 0) | (np.diff(image) != 0)
    reached = np.searchsorted(THRESHOLDS, iou[order], side="right")
    return _Pairs(rank, begins.tolist(), g[order].tolist(), reached.tolist())


def _iou(objects: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """XYWH (G, 4) and XYXY (P, 4) -> (G, P), rounded as pycocotools rounds it: both as XYWH, sides by addition."""
    (ox, oy, ow, oh), (x, y, x2, y2) = objects.T[:, :, None], boxes.T
    w, h = x2 - x, y2 - y
    shared = np.minimum(w + x, ow + ox) - np.maximum(x, ox)
    np.maximum(shared, 0, out=shared)
    height = np.minimum(h + y, oh + oy) - np.maximum(y, oy)
    np.maximum(height, 0, out=height)
    shared *= height
    union = w * h + ow * oh
    union -= shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=shared > 0)


def _match(pairs: _Pairs, wanted: list[int], reach: list[int], limits: Sequence[int]) -> Iterator[list[int]]:
    """After each limit, the bits of `wanted` that are still to be found. All ranges and thresholds go at once, a bit for each.

    Args:
        wanted: of each object, the bits at which it counts.
        reach: the bits at which an IoU is enough that reaches 0, 1, ... T thresholds.
    """
    wanted, begin, idle = list(wanted), 0, 0
    for end in np.searchsorted(pairs.rank, limits).tolist():
        for begins, g, count in zip(pairs.begins[begin:end], pairs.objects[begin:end], pairs.reached[begin:end], strict=True):
            if begins:
                idle = reach[-1]  # the bits at which this box has no object yet
            if hit := idle & wanted[g] & reach[count]:
                wanted[g] ^= hit
                idle ^= hit
        begin = end
        yield list(wanted)


def _masks(on: np.ndarray) -> list[int]:
    """(n, A, T) bool -> n numbers with a bit for each range and threshold."""
    packed = np.packbits(on.reshape(len(on), math.prod(on.shape[1:])), axis=1, bitorder="little")
    return [int.from_bytes(row.tobytes(), "little") for row in packed]


def _bits(masks: list[int], areas: int) -> np.ndarray:
    """The inverse: (n, A, T) bool."""
    count = areas * len(THRESHOLDS)
    size = -(-count // 8)
    packed = np.frombuffer(b"".join(mask.to_bytes(size, "little") for mask in masks), np.uint8).reshape(-1, size)
    return np.unpackbits(packed, axis=1, bitorder="little")[:, :count].reshape(-1, areas, len(THRESHOLDS)).astype(bool)

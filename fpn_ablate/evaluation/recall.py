"""Class-agnostic recall by COCO's rule, from the few pairs of box and object that overlap enough to match: by boxes or masks.

At each IoU threshold and for each range of areas, COCO's evaluator goes through the boxes of an image, best first, and matches
each to the free object that it overlaps most. Crowd regions and objects outside the range take part too, but only get boxes
that match no counted object. So recall does not depend on them, and they are left out here.

I images, L limits, A ranges of areas, T IoU thresholds, M boxes, G objects.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fpn_ablate.utils import rle

THRESHOLDS = np.linspace(0.5, 0.95, 10)
IMAGES_AT_ONCE = 256  # their pairs are in memory together


@dataclass(frozen=True)
class Matches:
    """Counts of matched and of all objects per image, by rising image id.

    Attributes:
        ids: (I,) of the images.
        matched: (I, L, A, T) objects that the best boxes match, for limits in rising order.
        objects: (I, A).
    """

    ids: np.ndarray
    matched: np.ndarray
    objects: np.ndarray

    def recall(self) -> np.ndarray:
        """Return recall over all images, averaged over thresholds: (L, A); NaN without objects."""
        objects = self.objects.sum(0)
        matched = self.matched.sum(0).mean(-1)
        return np.divide(matched, objects, out=np.full(matched.shape, np.nan), where=objects > 0)


def match_boxes(
    truth: dict[str, Any],
    image_ids: np.ndarray,
    boxes: np.ndarray,
    scores: np.ndarray,
    areas: Sequence[tuple[float, float]],
    limits: Sequence[int],
    masks: Sequence[bytes] | None = None,
) -> Matches:
    """Match boxes to the objects of `truth`, a COCO instances dictionary, and count the matched objects per image.

    Args:
        image_ids, boxes, scores: (M,), (M, 4) XYXY, (M,). Boxes in images that `truth` does not declare are ignored; equal
            scores keep their order.
        areas: (smallest, largest) in square pixels, both included.
        limits: numbers of best boxes per image that count.
        masks: of the boxes (M); if given, they are compared with the `segmentation` of objects in place of the boxes.
    """
    ids = np.unique(np.array([image["id"] for image in truth["images"]], dtype=np.int64))
    declared = set(ids.tolist())
    counted = [a for a in truth["annotations"] if not a.get("iscrowd") and a["image_id"] in declared]
    owner = np.searchsorted(ids, np.array([a["image_id"] for a in counted], dtype=np.int64))
    order = np.argsort(owner, kind="stable")
    owner, counted = owner[order], [counted[n] for n in order]
    xywh = np.array([a["bbox"] for a in counted], dtype=float).reshape(-1, 4)
    overlaps = _box_overlaps(xywh, boxes) if masks is None else _mask_overlaps(counted, masks, image_sizes(truth))
    area = np.array([a.get("area", a["bbox"][2] * a["bbox"][3]) for a in counted], dtype=float)
    within = np.stack([(low <= area) & (area <= high) for low, high in areas], 1)  # (G, A)
    limits = sorted(limits)
    ranked, first = _ranked(ids, image_ids, scores, limits[-1])
    thresholds = np.arange(len(THRESHOLDS) + 1)[:, None] > np.arange(len(THRESHOLDS))  # (T + 1, T)
    reach = _masks(np.repeat(thresholds[:, None], len(areas), axis=1))
    matched = np.zeros((len(ids), len(limits), len(areas), len(THRESHOLDS)), dtype=np.int64)
    for begin in range(0, len(ids), IMAGES_AT_ONCE):
        images = range(begin, min(begin + IMAGES_AT_ONCE, len(ids)))
        chunk = slice(*np.searchsorted(owner, (images.start, images.stop)))
        countable = np.repeat(within[chunk, :, None], len(THRESHOLDS), axis=2)
        rank, pairs = _pairs(images, owner, overlaps, ranked, first)
        for number, unmatched in enumerate(_match(rank, pairs, _masks(countable), reach, limits)):
            np.add.at(matched, (owner[chunk], number), countable & ~_bits(unmatched, len(areas)))
    objects = np.zeros((len(ids), len(areas)), dtype=np.int64)
    np.add.at(objects, owner, within)
    return Matches(ids, matched, objects)


def _ranked(ids: np.ndarray, image_ids: np.ndarray, scores: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Return positions of the `limit` best boxes of each image, image by image, best first, and each image's start (I + 1,)."""
    order = np.lexsort((-scores, image_ids))
    sorted_ids = image_ids[order]
    first, last = np.searchsorted(sorted_ids, ids), np.searchsorted(sorted_ids, ids, side="right")
    last = np.minimum(last, first + limit)
    best = [order[a:b] for a, b in zip(first, last, strict=True)]
    return np.concatenate([*best, order[:0]]), np.concatenate([[0], np.cumsum(last - first)])


def image_sizes(truth: dict[str, Any]) -> dict[int, rle.Size]:
    """Return (height, width) of the images of a COCO instances dictionary, by id."""
    return {image["id"]: (image["height"], image["width"]) for image in truth["images"]}


# (objects of an image, as a slice; positions of P boxes there) -> IoU (G, P)
Overlaps = Callable[[slice, np.ndarray], np.ndarray]


def _box_overlaps(xywh: np.ndarray, boxes: np.ndarray) -> Overlaps:
    return lambda objects, best: _iou(xywh[objects], boxes[best].astype(float))


def _mask_overlaps(counted: Sequence[dict[str, Any]], masks: Sequence[bytes], sizes: dict[int, rle.Size]) -> Overlaps:
    def overlaps(objects: slice, best: np.ndarray) -> np.ndarray:
        annotations = counted[objects]
        if not annotations:
            return np.zeros((0, len(best)))
        size = sizes[annotations[0]["image_id"]]
        of_objects = [rle.from_segmentation(a["segmentation"], size) for a in annotations]
        return rle.iou(of_objects, [masks[m] for m in best], size)

    return overlaps


def _pairs(
    images: range, owner: np.ndarray, overlaps: Overlaps, ranked: np.ndarray, first: np.ndarray
) -> tuple[np.ndarray, list[tuple[bool, int, int]]]:
    """Find the pairs of a box and an object of some images whose IoU reaches the lowest threshold, in matching order.

    Boxes by rank, images side by side; the objects of a box by falling IoU, the last object first among equal IoUs.

    Returns:
        The rank of each pair's box in its image; and for each pair whether it is the first of its box, the index of its object
        from the first of these images, and the number of thresholds that its IoU reaches.
    """
    columns = []
    begin = np.searchsorted(owner, images.start)
    for n in images:
        low, high = np.searchsorted(owner, (n, n + 1))
        iou = overlaps(slice(low, high), ranked[first[n] : first[n + 1]])
        g, rank = np.nonzero(iou >= THRESHOLDS[0])
        columns.append((rank, np.full(len(g), n), g + (low - begin), iou[g, rank]))
    rank, image, g, iou = (np.concatenate(column) for column in zip(*columns, strict=True))
    order = np.lexsort((-g, -iou, image, rank))
    rank, image = rank[order], image[order]
    begins = np.ones(len(rank), dtype=bool)
    begins[1:] = (np.diff(rank) != 0) | (np.diff(image) != 0)
    reached = np.searchsorted(THRESHOLDS, iou[order], side="right")
    return rank, list(zip(begins.tolist(), g[order].tolist(), reached.tolist(), strict=True))


def _iou(objects: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Compute the IoU of XYWH (G, 4) and XYXY (P, 4): (G, P), rounded as in pycocotools: both as XYWH, sides by addition."""
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


def _match(
    rank: np.ndarray,
    pairs: list[tuple[bool, int, int]],
    unmatched: list[int],
    reach: list[int],
    limits: Sequence[int],
) -> Iterator[list[int]]:
    """Match pair by pair; yield, at each limit, the bits of `unmatched` that remain. Each range and threshold has a bit.

    Args:
        rank, pairs: as `_pairs` returns them.
        unmatched: the bits at which each object counts.
        reach: the bits at which an IoU suffices that reaches 0, 1, ... T thresholds.
    """
    unmatched, begin, idle = list(unmatched), 0, 0
    for end in np.searchsorted(rank, limits).tolist():
        for begins, g, count in pairs[begin:end]:
            if begins:
                idle = reach[-1]  # the bits at which this box has no match yet
            if hit := idle & unmatched[g] & reach[count]:
                unmatched[g] ^= hit
                idle ^= hit
        begin = end
        yield list(unmatched)


def _masks(on: np.ndarray) -> list[int]:
    """Pack (n, A, T) bool into n integers with a bit for each range and threshold."""
    packed = np.packbits(on.reshape(len(on), math.prod(on.shape[1:])), axis=1, bitorder="little")
    return [int.from_bytes(row.tobytes(), "little") for row in packed]


def _bits(masks: list[int], areas: int) -> np.ndarray:
    """Unpack what `_masks` packs: (n, A, T) bool."""
    count = areas * len(THRESHOLDS)
    size = -(-count // 8)
    packed = np.frombuffer(b"".join(mask.to_bytes(size, "little") for mask in masks), np.uint8).reshape(-1, size)
    return np.unpackbits(packed, axis=1, bitorder="little")[:, :count].reshape(-1, areas, len(THRESHOLDS)).astype(bool)

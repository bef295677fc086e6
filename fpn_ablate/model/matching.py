"""Match anchors or RoIs with objects (Sec. 4.1), and sample the ones that a step trains on. Whole batches, no loop over images.

Shape letters: N images, R anchors or RoIs, G ground-truth boxes (padded; `valid` marks the real ones), S samples an image.
"""

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from fpn_ablate.model import boxes

POSITIVE, NEGATIVE, IGNORED = 1, 0, -1
# Pairs of an object and an anchor that are compared at once. A batch with more goes image by image: equal results, less memory.
# On a CPU, pairs that do not fit into its caches take nearly twice the time.
MAX_PAIRS = defaultdict(lambda: 2**26, cpu=2**20)


def match(
    anchors: Tensor,
    gt_boxes: Tensor,
    valid: Tensor,
    crowd: Tensor,
    positive_iou: float,
    negative_iou: float,
    allow_low_quality_matches: bool = True,
    low_quality_iou: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Match anchors (R, 4), or the RoIs (N, R, 4) of each image, with ground truth (N, G, 4).

    Positive: an IoU of at least `positive_iou` with any object. With `allow_low_quality_matches` (the RPN's rule), also the
    highest IoU for some object, and all anchors that tie for it, if they overlap any object by `low_quality_iou`. Negative: an
    IoU under `negative_iou` with all objects. The rest is ignored, and so are negatives that lie in a crowd region by half of
    their own area.

    Returns:
        matched_idxs (N, R) int64: the object that the anchor overlaps most; labels (N, R) int8: POSITIVE, NEGATIVE, IGNORED.
    """
    n, g = valid.shape
    anchors = anchors.expand(n, -1, -1)
    if g == 0:
        empty = torch.zeros(anchors.shape[:2], dtype=torch.int64, device=anchors.device)
        return empty, empty.to(torch.int8)
    if too_many_pairs(valid, anchors.shape[1]):
        rules = positive_iou, negative_iou, allow_low_quality_matches, low_quality_iou
        return image_by_image(lambda *image: match(*image, *rules), anchors, gt_boxes, valid, crowd)
    intersections = boxes.intersection(gt_boxes, anchors)  # (N, G, R)
    anchor_area = boxes.area(anchors)
    overlap = boxes.iou_from(intersections, boxes.area(gt_boxes), anchor_area).masked_fill_(~valid[..., None], -1)
    # The first of the objects that an anchor overlaps most. `max` with indices takes twice the time.
    best, order = overlap.amax(1), torch.arange(g, 0, -1, dtype=torch.int16, device=overlap.device)[:, None]
    matched_idxs = g - ((overlap == best[:, None]) * order).amax(1).long()
    labels = torch.full_like(matched_idxs, IGNORED, dtype=torch.int8)
    labels.masked_fill_(best < negative_iou, NEGATIVE)
    if perhaps_any(crowd):  # a sixth of the time, and few images have a crowd
        in_crowd = ((2 * intersections >= anchor_area[:, None]) & crowd[..., None]).any(1)
        labels.masked_fill_((labels == NEGATIVE) & in_crowd, IGNORED)
    labels.masked_fill_(best >= positive_iou, POSITIVE)
    if allow_low_quality_matches:
        # An object that no anchor fits well still gets its best ones. An IoU of 0 is no match.
        highest = overlap.amax(2, keepdim=True)
        highest_of_object = (overlap == highest.masked_fill_(highest <= 0, torch.inf)).any(1)
        labels.masked_fill_(highest_of_object & (best >= low_quality_iou), POSITIVE)
    return matched_idxs, labels


def too_many_pairs(valid: Tensor, candidates: int) -> bool:
    """Return whether the objects of a batch, `valid` (N, G), are to be compared with the candidates image by image."""
    return len(valid) > 1 and valid.numel() * candidates > MAX_PAIRS[valid.device.type]


def image_by_image(matcher: Callable[..., tuple[Tensor, Tensor]], *columns: Tensor | None) -> tuple[Tensor, Tensor]:
    """Call `matcher` with the rows of `columns` (N, ...), one image at a time, and return its results for the batch."""
    images = zip(*(column.split(1) for column in columns if column is not None), strict=True)
    matched_idxs, labels = zip(*(matcher(*image) for image in images), strict=True)
    return torch.cat(matched_idxs), torch.cat(labels)


def perhaps_any(mask: Tensor) -> bool:
    """Return whether anything is marked; on a GPU, for whose answer the host would wait, True."""
    return mask.is_cuda or bool(mask.any())


def sample(labels: Tensor, count: int, positive_fraction: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sample up to `count` anchors an image without replacement: up to `positive_fraction` positives, the rest negatives.

    Returns:
        idxs (N, S) int64 with S = min(count, R), and sampled_mask (N, S) bool: False for entries past an image's samples.
    """
    keys = torch.rand(labels.shape, generator=generator, device=labels.device)
    samples = min(count, labels.shape[1])
    # The positives with the largest keys, as many as the quota admits; then they outrank every negative.
    key, positives = torch.where(labels == POSITIVE, keys, -1).topk(min(int(count * positive_fraction), samples), dim=1)
    score = torch.where(labels == NEGATIVE, keys, -1)
    score = score.scatter(1, positives, torch.where(key >= 0, key + 1, score.gather(1, positives)))
    key, idxs = score.topk(samples, dim=1)
    return idxs, key >= 0

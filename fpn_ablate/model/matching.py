"""Which anchor answers for which object (Sec. 4.1), and which anchors a step looks at. Whole batches, no loop over images.

N images, R anchors, G ground-truth boxes (padded; `valid` marks the real ones).
"""

from collections import defaultdict

import torch
from torch import Tensor

from fpn_ablate.model import boxes

POSITIVE, NEGATIVE, IGNORED = 1, 0, -1
# Pairs of an object and an anchor that are looked at together; more go image by image, with equal results and less memory. On a
# CPU what does not fit into its caches takes nearly twice the time.
MOST_PAIRS = defaultdict(lambda: 2**26, cpu=2**20)


def match(
    anchors: Tensor,
    gt_boxes: Tensor,
    valid: Tensor,
    crowd: Tensor,
    high: float,
    low: float,
    best_of_object: bool = True,
) -> tuple[Tensor, Tensor]:
    """Match anchors (R, 4), or each image's own RoIs (N, R, 4), with ground truth (N, G, 4).

    Positive: IoU of at least `high` with any object, or, with `best_of_object` (the RPN's rule), the highest IoU for some
    object (all that tie). Negative: IoU under `low` with all objects. Others are ignored, and so are negatives that lie in a
    crowd region by half of their own area.

    Returns:
        matched_idxs (N, R) int64: the object that the anchor overlaps most; labels (N, R) int8: POSITIVE, NEGATIVE, IGNORED.
    """
    n, g = valid.shape
    anchors = anchors.expand(n, -1, -1)
    if g == 0:
        empty = torch.zeros(anchors.shape[:2], dtype=torch.int64, device=anchors.device)
        return empty, empty.to(torch.int8)
    if n > 1 and n * g * anchors.shape[1] > MOST_PAIRS[anchors.device.type]:
        columns = (column.split(1) for column in (anchors, gt_boxes, valid, crowd))
        each = (match(*one, high, low, best_of_object) for one in zip(*columns, strict=True))
        return tuple(torch.cat(column) for column in zip(*each, strict=True))
    shared = boxes.intersection(gt_boxes, anchors)  # (N, G, R)
    anchor_area = boxes.area(anchors)
    overlap = boxes.iou_from(shared, boxes.area(gt_boxes), anchor_area).masked_fill_(~valid[..., None], -1)
    best, matched_idxs = overlap.max(1)
    labels = torch.full_like(matched_idxs, IGNORED, dtype=torch.int8)
    labels.masked_fill_(best < low, NEGATIVE)
    in_crowd = ((2 * shared >= anchor_area[:, None]) & crowd[..., None]).any(1)
    labels.masked_fill_((labels == NEGATIVE) & in_crowd, IGNORED)
    labels.masked_fill_(best >= high, POSITIVE)
    if best_of_object:
        # Low-quality matches: an object that no anchor fits well still gets its best ones. An IoU of 0 is no match.
        highest = overlap.amax(2, keepdim=True)
        labels.masked_fill_((overlap == highest.masked_fill_(highest <= 0, torch.inf)).any(1), POSITIVE)
    return matched_idxs, labels


def sample(labels: Tensor, count: int, positive_fraction: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw up to `count` anchors an image without replacement: up to `positive_fraction` positives, the rest negatives.

    Returns:
        idxs (N, S) int64 with S = min(count, R), and chosen (N, S) bool: entries past an image's draw are not chosen.
    """
    keys = torch.rand(labels.shape, generator=generator, device=labels.device)
    most = min(count, labels.shape[1])
    # The positives with the largest keys, as many as the quota admits; then they outrank every negative.
    key, first = torch.where(labels == POSITIVE, keys, -1).topk(min(int(count * positive_fraction), most), dim=1)
    score = torch.where(labels == NEGATIVE, keys, -1)
    score = score.scatter(1, first, torch.where(key >= 0, key + 1, score.gather(1, first)))
    key, idxs = score.topk(most, dim=1)
    return idxs, key >= 0

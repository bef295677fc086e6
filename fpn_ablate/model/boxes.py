"""Box arithmetic for whole batches. Boxes are (..., 4), XYXY in absolute pixels.

Shape letters: N images, P boxes an image, A and B the numbers of boxes that are compared in pairs.
"""

import math

import torch
from torch import Tensor

from fpn_ablate.model.precision import full_precision

# exp() of a larger width or height delta is a box far beyond any image; Detectron's bound.
MAX_LOG_SCALE = math.log(1000 / 16)


def area(boxes: Tensor) -> Tensor:
    """Return the areas (...) of boxes (..., 4) in square pixels."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def intersection(a: Tensor, b: Tensor) -> Tensor:
    """Return the intersections of all pairs in square pixels: (..., A, 4) x (..., B, 4) -> (..., A, B)."""
    # One coordinate at a time and in place: nearly twice as fast as stacking pairs and multiplying over the last axis.
    ax1, ay1, ax2, ay2 = a[..., :, None, :].unbind(-1)
    # Coordinates of the many boxes side by side in memory: another third less.
    bx1, by1, bx2, by2 = (column.contiguous() for column in b[..., None, :, :].unbind(-1))
    width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp_(min=0)
    return width.mul_((torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp_(min=0))


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the IoU of all pairs: (..., A, 4) x (..., B, 4) -> (..., A, B) in [0, 1]; 0 where both are empty (padding)."""
    return iou_from(intersection(a, b), area(a), area(b))


def iou_from(intersections: Tensor, area_a: Tensor, area_b: Tensor) -> Tensor:
    """Return `iou` from intersections (..., A, B) computed before and areas (..., A) and (..., B)."""
    union = area_a[..., :, None] + area_b[..., None, :] - intersections
    return intersections / union.clamp(min=1e-9)


def encode(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Return the deltas (..., 4) = (dx, dy, dw, dh) that `decode` turns back into `boxes` (Fast R-CNN, appendix of R-CNN)."""
    size, anchor_size = boxes[..., 2:] - boxes[..., :2], anchors[..., 2:] - anchors[..., :2]
    center, anchor_center = boxes[..., :2] + size / 2, anchors[..., :2] + anchor_size / 2
    return torch.cat([(center - anchor_center) / anchor_size, torch.log(size / anchor_size)], -1)


def decode(deltas: Tensor, anchors: Tensor) -> Tensor:
    """Return the boxes of deltas (..., 4) and of anchors that broadcast to them: (..., 4), in fp32 at least."""
    deltas = full_precision(deltas)
    anchor_size = anchors[..., 2:] - anchors[..., :2]
    center = anchors[..., :2] + anchor_size / 2 + deltas[..., :2] * anchor_size
    half = anchor_size * deltas[..., 2:].clamp(max=MAX_LOG_SCALE).exp() / 2
    return torch.cat([center - half, center + half], -1)


def clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Clip boxes (N, P, 4) to images of `sizes` (N, 2): height, width."""
    limit = sizes.flip(-1).repeat(1, 2)[:, None].to(boxes.dtype)
    return torch.minimum(boxes.clamp(min=0), limit)

"""Non-maximum suppression of a whole batch.

Shape letters: N images, M boxes of all images, D boxes that an image keeps.
"""

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from fpn_ablate.structures.instances import BatchDetections


def suppress(
    boxes: Tensor, scores: Tensor, image: Tensor, group: Tensor, num_images: int, nms_thresh: float, topk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Apply NMS to each group of boxes, and keep the best `topk` of each image; None: all that NMS leaves.

    Args:
        boxes, scores: (M, 4) and (M,).
        image, group: (M,) int64; boxes of one group are of one image.

    Returns:
        idxs (N, D) of the M boxes, best first, and valid (N, D): False for padding, whose index is 0.
    """
    # One call for all images. An offset keeps groups apart; fp32 could not hold it to a fraction of a pixel.
    keep = batched_nms(boxes.double(), scores.double(), group, nms_thresh)
    keep = keep[image[keep].argsort(stable=True)]  # image by image, best first within one
    image = image[keep]
    count = (image == torch.arange(num_images, device=image.device)[:, None]).sum(1)
    rank = torch.arange(len(image), device=image.device) - (count.cumsum(0) - count)[image]
    longest = int(count.max())
    longest = longest if topk is None else min(topk, longest)
    best = (rank < longest).nonzero()[:, 0]
    idxs, valid = keep.new_zeros(num_images, longest), keep.new_zeros(num_images, longest, dtype=torch.bool)
    idxs[image[best], rank[best]], valid[image[best], rank[best]] = keep[best], True
    return idxs, valid


def best_detections(
    boxes: Tensor, scores: Tensor, image: Tensor, labels: Tensor, num_images: int, nms_thresh: float, topk: int
) -> BatchDetections:
    """Apply NMS to each class of each image, and return the best `topk` boxes of an image; padding is 0.

    Args:
        boxes, scores: (M, 4) and (M,).
        image, labels: (M,) int64; labels are 1..K.
    """
    idxs, valid = suppress(boxes, scores, image, labels * num_images + image, num_images, nms_thresh, topk)
    columns = (torch.where(valid[..., None], x[idxs], 0) for x in (boxes, scores[:, None], labels[:, None]))
    boxes, scores, labels = columns
    return BatchDetections(boxes, scores[..., 0], labels[..., 0], valid)

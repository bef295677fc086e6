"""Best possible cover of objects by a row's anchors, before any training (Sec. 4.1).

M objects, A anchors per cell of a level.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fpn_ablate.config.dense import DenseTask, RetinaNetTask
from fpn_ablate.config.parts import ImagePyramidConfig
from fpn_ablate.config.schema import Config
from fpn_ablate.config.tasks import SegmentProposalsTask
from fpn_ablate.data.transforms import DIVISOR, Resize
from fpn_ablate.model import anchors, boxes
from fpn_ablate.model.build import build_backbone, build_detector, build_neck
from fpn_ablate.model.detectors.image_pyramid import anchor_sizes_read

Sides = tuple[float, tuple[float, ...]]  # a level's stride and the side lengths of its anchors, in pixels of the input
AnchorSet = tuple[tuple[Sides, ...], tuple[float, ...]]  # levels and aspect ratios, equal for rows with equal anchors


def anchors_of(cfg: Config) -> AnchorSet:
    """Return the anchors of a row at the recipe's input size: of its RPN (of an image pyramid those of all scales), or of
    RetinaNet's head. Levels have no sides where the row's head has no anchors of this kind.
    """
    with torch.device("meta"):  # the neck publishes its levels
        if isinstance(cfg.task, RetinaNetTask):
            grids = build_detector(cfg).head.anchors
            pairs = zip(grids.levels, grids.sizes, strict=False)
            return tuple((level.stride, tuple(sides)) for level, sides in pairs), tuple(grids.ratios)
        levels = build_neck(cfg.neck, build_backbone(cfg.backbone).levels).levels
    if isinstance(cfg.task, DenseTask | SegmentProposalsTask):
        return tuple((level.stride, ()) for level in levels), ()
    sizes = [anchors.scaled(size, cfg.recipe.short_side) for size in cfg.rpn.anchor_sizes]
    sizes = anchors.sizes_per_level(levels, sizes, cfg.rpn.shared)
    pairs = [(level.stride, tuple(sides)) for level, sides in zip(levels, sizes, strict=False)]
    if cfg.image_pyramid:
        pairs = list(_at_scales(pairs, cfg.image_pyramid, cfg.recipe.short_side))
    return tuple(pairs), tuple(cfg.rpn.anchor_ratios)


def _at_scales(levels: Sequence[Sides], pyramid: ImagePyramidConfig, short_side: int) -> Iterator[Sides]:
    """Yield the levels of each scale with the anchors that are read there, in pixels of the input."""
    all_sizes = sorted({size for _, sides in levels for size in sides})
    read = anchor_sizes_read(all_sizes, pyramid.scales, anchors.scaled(pyramid.box_size, short_side))
    for scale, sizes in zip(pyramid.scales, read, strict=True):
        for stride, sides in levels:
            if kept := [side / scale for side in sides if side in sizes]:
                yield stride / scale, tuple(kept)


def input_sizes(sizes: np.ndarray, resize: Resize) -> np.ndarray:
    """Map native heights and widths (N, 2) to those of the network's input (N, 2), without padding."""
    unique, inverse = np.unique(sizes, axis=0, return_inverse=True)  # `Resize` is the only source, and it is not vectorised
    resized = [resize.size(height, width) for height, width in unique.tolist()]
    return np.array(resized, np.int64).reshape(-1, 2)[inverse.reshape(-1)]


def best_iou(objects: Tensor, sizes: Tensor, anchor_set: AnchorSet) -> Tensor:
    """Compute the IoU (M,) of each object with the best anchor of its image.

    Among anchors of one shape, the best is the one with the nearest centre: width and height of the intersection never grow
    with the distance along their axis. So A anchors per object and level are compared, not the whole grid. Each image is
    padded as if alone; in a batch with a larger image it has a few more cells beyond its right and lower border.

    Args:
        objects: (M, 4) XYXY in pixels of the input.
        sizes: (M, 2) height and width of each object's image in the input, without padding.
    """
    levels, ratios = anchor_set
    candidates = torch.cat([_nearest(objects, sizes, *level, ratios) for level in levels], 1)
    return boxes.iou(objects[:, None], candidates)[:, 0].amax(1)


def _nearest(objects: Tensor, sizes: Tensor, stride: float, sides: Sequence[float], ratios: Sequence[float]) -> Tensor:
    """Return one level's anchors (M, A, 4) at the cell whose centre, (column, row) * stride, is nearest to the object's."""
    padded = -(-sizes // DIVISOR) * DIVISOR
    last = (-(-padded // stride) - 1).flip(-1)  # (M, 2) last column and row
    centre = (objects[:, :2] + objects[:, 2:]) / 2
    cell = torch.minimum((centre / stride).round().clamp(min=0), last)
    return (cell * stride).repeat(1, 2)[:, None] + anchors.cell_anchors(sides, ratios)

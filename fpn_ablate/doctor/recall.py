"""How well the anchors of a row can cover objects at best, before anything is learnt (Sec. 4.1).

M objects, A anchors a cell of a level.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fpn_ablate.config.schema import Config
from fpn_ablate.data.transforms import Resize
from fpn_ablate.model import anchors, boxes
from fpn_ablate.model.build import build_detector, rpn_settings

AT_ONCE = 1 << 16  # objects: 15 anchors of each are some tens of megabytes
PADDING = 32  # data.transforms.collate: images are padded to a multiple of it
# (stride, side lengths of its anchors) of each level, and the ratios: rows that have these in common have their anchors so.
Anchors = tuple[tuple[tuple[int, tuple[float, ...]], ...], tuple[float, ...]]


def anchors_of(cfg: Config) -> Anchors:
    """The anchors of a row's RPN at the recipe's input size."""
    with torch.device("meta"):  # the neck says what its levels are
        levels = build_detector(cfg, parts=()).neck.levels
    settings = rpn_settings(cfg.rpn, cfg.recipe.short_side)
    sizes = anchors.sizes_per_level(levels, settings.sizes)
    pairs = zip(levels, sizes, strict=False)
    return tuple((level.stride, tuple(own)) for level, own in pairs), tuple(settings.ratios)


def input_sizes(sizes: np.ndarray, resize: Resize) -> np.ndarray:
    """(N, 2) native heights and widths -> (N, 2) those of the network's input, without padding."""
    unique, inverse = np.unique(sizes, axis=0, return_inverse=True)  # `Resize` is the one source, and it is not vectorised
    resized = [resize.size(height, width) for height, width in unique.tolist()]
    return np.array(resized, np.int64).reshape(-1, 2)[inverse.reshape(-1)]


def best_iou(objects: Tensor, sizes: Tensor, what: Anchors) -> Tensor:
    """(M,) the IoU of each object with the best anchor of its image.

    Each image is padded to a multiple of 32 by itself; in a batch with a larger one there are a few cells more behind its
    right and its lower border. Of all anchors of one shape the best is the one whose centre is nearest: width and height of
    the intersection never grow with the distance along their axis. So A anchors an object are compared, not the whole grid.

    Args:
        objects: (M, 4) XYXY in pixels of the input.
        sizes: (M, 2) height and width of each one's image in the input, without padding.
    """
    best = objects.new_zeros(len(objects))
    for start in range(0, len(objects), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        candidates = torch.cat([_nearest(objects[part], sizes[part], *level, what[1]) for level in what[0]], 1)
        best[part] = boxes.iou(objects[part, None], candidates)[:, 0].amax(1)
    return best


def _nearest(objects: Tensor, sizes: Tensor, stride: int, sides: Sequence[float], ratios: Sequence[float]) -> Tensor:
    """(M, A, 4) the anchors of one level at the cell whose centre, (column, row) * stride, is nearest to the object's."""
    padded = -(-sizes // PADDING) * PADDING
    last = (-(-padded // stride) - 1).flip(-1)  # (M, 2) last column and row
    centre = (objects[:, :2] + objects[:, 2:]) / 2
    cell = torch.minimum((centre / stride).round().clamp(min=0), last)
    return (cell * stride).repeat(1, 2)[:, None] + anchors.cell_anchors(sides, ratios)

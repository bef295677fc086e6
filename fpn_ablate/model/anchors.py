"""Anchors (Sec. 4.1): their sizes, their places, their number.

Shape letters: N images, L levels, A anchors a cell, Hi x Wi cells of level i, R = sum(Hi * Wi * A) anchors an image.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fpn_ablate.structures.levels import Level

# The paper's sizes in pixels are those of an image with this short side (Sec. 5); they scale with that of the input.
PAPER_SHORT_SIDE = 800
FINEST = 2  # the smallest size is that of P2


def scaled(size: float, short_side: int) -> float:
    """Return a size in pixels of the paper's images in pixels of an input with this short side."""
    return size * short_side / PAPER_SHORT_SIDE


def sizes_per_level(levels: Sequence[Level], sizes: Sequence[float], shared: bool = True) -> list[list[float]]:
    """Return the anchor sizes of each level: one size a level of a pyramid, all sizes on a single map.

    A pyramid with fewer levels than sizes (no P6) leaves the largest ones out, since a head that all levels share has as many
    anchors a cell on each. With heads of their own (`shared` false) each size stays on the stride that it has on P2..P6, or on
    the nearest that there is, as RoIs do (Eq. 1); no level is left without one.
    """
    if len(levels) == 1:
        return [list(sizes)]
    if shared or len(levels) >= len(sizes):
        return [[size] for _, size in zip(levels, sizes, strict=False)]
    finest, last = int(levels[0].name[1:]), len(levels) - 1
    per_level: list[list[float]] = [[] for _ in levels]
    for number, size in enumerate(sizes):
        by_stride = min(max(FINEST + number - finest, 0), last)
        per_level[max(by_stride, number + len(levels) - len(sizes))].append(size)
    return per_level


def cell_anchors(sizes: Sequence[float], ratios: Sequence[float], round_to_pixels: bool = False) -> Tensor:
    """Return the anchors of one cell: (A, 4), XYXY around the origin. Sizes vary slowest.

    Args:
        ratios: height / width. Each anchor has the area size^2.
        round_to_pixels: round the corners, half to even, as torchvision does. Areas and ratios are then only nearly exact.
    """
    rows = []
    for size in sizes:
        for ratio in ratios:
            width, height = size / math.sqrt(ratio), size * math.sqrt(ratio)
            rows.append([-width / 2, -height / 2, width / 2, height / 2])
    anchors = torch.tensor(rows)
    return anchors.round() if round_to_pixels else anchors


def grid(base_anchors: Tensor, strides: tuple[int, int], height: int, width: int) -> Tensor:
    """Place the anchors (A, 4) of one cell on every cell of a map: (height * width * A, 4).

    The order is row by row, cell by cell, anchor by anchor, as in `flatten_cells`. The centre of cell (i, j) is pixel
    (i, j) * strides: a chain of stride-2 convolutions with padding is centred there. Anchors that reach outside the image are
    kept, in the baselines too (Sec. 5.1).

    Args:
        strides: down and right, in pixels.
    """
    y, x = (torch.arange(n, device=base_anchors.device) * stride for n, stride in zip((height, width), strides, strict=True))
    shift = torch.stack([*torch.meshgrid(y, x, indexing="ij")][::-1], -1).repeat(1, 1, 2).float()
    return (shift[:, :, None] + base_anchors).reshape(-1, 4)


def flatten_cells(x: Tensor, values: int) -> Tensor:
    """Reorder a head's output (N, A * values, Hi, Wi) to (N, Hi * Wi * A, values), the order of `grid`."""
    n, _, height, width = x.shape
    return x.view(n, -1, values, height, width).permute(0, 3, 4, 1, 2).reshape(n, -1, values)

"""Anchors (Sec. 4.1). L levels, A anchors a cell, R = sum over levels of Hi * Wi * A anchors an image."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fpn_ablate.structures.levels import Level


def sizes_per_level(levels: Sequence[Level], sizes: Sequence[float]) -> list[list[float]]:
    """Side lengths that each level carries: one a level over a pyramid, all of them on a single map.

    A pyramid with fewer levels than sizes (no P6) leaves the largest ones out.
    """
    if len(levels) == 1:
        return [list(sizes)]
    return [[size] for _, size in zip(levels, sizes, strict=False)]


def cell_anchors(sizes: Sequence[float], ratios: Sequence[float], whole: bool = False) -> Tensor:
    """(A, 4) XYXY around the origin; `ratios` are height / width, each anchor has the area size^2. Sizes vary slowest.

    Args:
        whole: round to whole pixels, half to even, as torchvision does; areas and ratios are then no longer those asked for.
    """
    rows = []
    for size in sizes:
        for ratio in ratios:
            width, height = size / math.sqrt(ratio), size * math.sqrt(ratio)
            rows.append([-width / 2, -height / 2, width / 2, height / 2])
    cells = torch.tensor(rows)
    return cells.round() if whole else cells


def grid(cell: Tensor, stride: int | tuple[int, int], height: int, width: int) -> Tensor:
    """(height * width * A, 4): row by row, cell by cell, anchor by anchor, the order of `flatten_cells`; `stride` downwards and
    to the right may differ.

    The centre of cell (i, j) is pixel (i, j) * stride: a chain of stride-2 convolutions with padding is centred there.
    Anchors that reach outside the image are kept, in the baselines too (Sec. 5.1).
    """
    down, right = stride if isinstance(stride, tuple) else (stride, stride)
    x = torch.arange(width, device=cell.device) * right
    y = torch.arange(height, device=cell.device) * down
    shift = torch.stack([*torch.meshgrid(y, x, indexing="ij")][::-1], -1).repeat(1, 1, 2).float()
    return (shift[:, :, None] + cell).reshape(-1, 4)


def flatten_cells(x: Tensor, values: int) -> Tensor:
    """A head's output (N, A * values, Hi, Wi) -> (N, Hi * Wi * A, values), in the order of `grid`."""
    n, _, height, width = x.shape
    return x.view(n, -1, values, height, width).permute(0, 3, 4, 1, 2).reshape(n, -1, values)


def count(levels: Sequence[Level], sizes: Sequence[float], ratios: Sequence[float], height: int, width: int) -> int:
    """Anchors of an image of height x width pixels, with ceil-divided strides: the "# anchors" column of Table 1."""
    return sum(
        math.ceil(height / level.stride) * math.ceil(width / level.stride) * len(own) * len(ratios)
        for level, own in zip(levels, sizes_per_level(levels, sizes), strict=False)
    )

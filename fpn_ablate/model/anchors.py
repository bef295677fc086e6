"""Anchors (Sec. 4.1): their sizes, their places, their number.

Shape letters: N images, L levels, A anchors a cell, Hi x Wi cells of level i, R = sum(Hi * Wi * A) anchors an image.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fpn_ablate.structures.levels import Features, Level

# The paper's sizes in pixels are those of an image with this short side (Sec. 5); they scale with that of the input.
PAPER_SHORT_SIDE = 800
FINEST = 2  # the smallest size is that of P2
# Shapes of batches whose anchors are kept. Grouped by aspect ratio, COCO's have a few dozen; each holds 4 MB at 800 x 1333.
MAX_GRIDS = 32


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


def centered(sides: Tensor, offset: float) -> Tensor:
    """Return boxes of `sides` (A, 2), width and height, around a point `offset` pixels right of and below a cell's: (A, 4)."""
    return torch.cat([offset - sides / 2, offset + sides / 2], -1)


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


class Grids:
    """Boxes on all cells of all levels, cached for the last MAX_GRIDS shapes.

    Args:
        levels: those that have boxes, finest first.
        cells: of each level, the boxes (A, 4) of one cell, XYXY around its place.
        whole_strides: strides are the image's sides divided by the map's, without remainder, as in torchvision. Where a map's
            side was rounded up (P6 of an 800 px side has 13 cells), that is a stride of 61 px in place of 64, and anchors that
            lie up to 36 px off their cells.
    """

    def __init__(self, levels: Sequence[Level], cells: Sequence[Tensor], whole_strides: bool = False) -> None:
        self.levels, self.cells, self.whole_strides = tuple(levels), cells, whole_strides
        self.cached: dict[tuple, list[Tensor]] = {}

    def __call__(self, features: Features) -> list[Tensor]:
        """Return the boxes (Ri, 4) of each level; `features` may have coarser levels, without boxes."""
        maps = list(features.values())[: len(self.cells)]
        shape = (*(tuple(x.shape[-2:]) for x in maps), maps[0].device)
        if shape not in self.cached:
            if len(self.cached) == MAX_GRIDS:
                del self.cached[next(iter(self.cached))]
            levels = zip(self.levels, self.cells, maps, strict=False)
            self.cached[shape] = [self._grid(*level, maps) for level in levels]
        return self.cached[shape]

    def _grid(self, level: Level, cell: Tensor, x: Tensor, maps: Sequence[Tensor]) -> Tensor:
        height, width = x.shape[-2:]
        strides = (level.stride, level.stride)
        if self.whole_strides:
            # The finest map divides the padded image without remainder.
            strides = tuple(
                side * self.levels[0].stride // cells for side, cells in zip(maps[0].shape[-2:], (height, width), strict=True)
            )
        return grid(cell.to(x.device), strides, height, width)


class AnchorGrids(Grids):
    """The anchors of all levels.

    Args:
        sizes: in pixels of the input, of each level.
        ratios: height / width.
        like_torchvision: corners rounded to whole pixels, and whole strides.
    """

    def __init__(
        self, levels: Sequence[Level], sizes: Sequence[Sequence[float]], ratios: Sequence[float], like_torchvision: bool
    ) -> None:
        cells = [cell_anchors(level_sizes, ratios, round_to_pixels=like_torchvision) for level_sizes in sizes]
        super().__init__(levels, cells, whole_strides=like_torchvision)
        self.sizes, self.ratios = sizes, ratios


def flatten_cells(x: Tensor, values: int) -> Tensor:
    """Reorder a head's output (N, A * values, Hi, Wi) to (N, Hi * Wi * A, values), the order of `grid`."""
    n, _, height, width = x.shape
    return x.view(n, -1, values, height, width).permute(0, 3, 4, 1, 2).reshape(n, -1, values)

"""3x3 convolutions at some cells alone, exact and with their gradients.

N images, L levels, C channels, S sampled cells an image. A cell is counted row by row over its map, and over the levels where
there are several.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpn_ablate.model.ops.constants import constant
from fpn_ablate.model.ops.onednn import linear


class LazyConv:
    """A map (N, C, H, W) and the 3x3 convolution over it, which is worked out where it is asked for."""

    def __init__(self, x: Tensor, conv: nn.Conv2d) -> None:
        self.x, self.conv = x, conv
        self.shape, self.device = x.shape, x.device

    def at(self, cell: Tensor) -> Tensor:
        """(K, C) of cells (K,), counted over the images as well."""
        height, width = self.shape[-2:]
        image, inside = cell // (height * width), cell % (height * width)
        y, x, within = _neighbours(inside // width, inside % width, height, width)
        rows = (image[:, None, None] * height + y) * width + x
        return conv3x3_at(_gather([_cells(self.x)], rows, within), self.conv)


def conv3x3_at(around: Tensor, conv: nn.Conv2d) -> Tensor:
    """(K, 9 C), what `around` gives -> (K, out) of a 3x3 convolution with stride 1."""
    return linear(around, conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias)


def gather_3x3(maps: Sequence[Tensor | LazyConv], cell: Tensor) -> Tensor:
    """(N * S, 9 C): the 3x3 cells around each of `cell` (N, S), counted over the levels; 0 outside a map."""
    sizes = constant(tuple(tuple(x.shape[-2:]) for x in maps), cell.device, torch.int64)
    ends = sizes.prod(1).cumsum(0)
    level = torch.searchsorted(ends, cell, right=True)
    height, width = sizes[level].unbind(-1)
    first = (ends - sizes.prod(1))[level]  # cell of its level
    y, x, within = _neighbours((cell - first) // width, (cell - first) % width, height, width)
    images = torch.arange(len(cell), device=cell.device)[:, None, None, None]
    height, width = height[..., None, None], width[..., None, None]
    rows = len(cell) * first[..., None, None] + (images * height + y) * width + x  # in a table of all cells, map by map
    tables, begin = [], 0
    for m in maps:
        if isinstance(m, LazyConv):
            end = begin + len(cell) * m.shape[-2] * m.shape[-1]
            here = within & (rows >= begin) & (rows < end)
            asked, place = rows[here].unique(return_inverse=True)
            tables.append(m.at(asked - begin))
            rows = torch.where(rows >= end, rows - end + begin + len(asked), rows)
            rows[here] = begin + place
        else:
            tables.append(_cells(m))
        begin += len(tables[-1])
    return _gather(tables, rows, within)


def _neighbours(y: Tensor, x: Tensor, height: Tensor | int, width: Tensor | int) -> tuple[Tensor, Tensor, Tensor]:
    """Of cells (...): rows, columns and whether they lie within the map, all (..., 3, 3) or such as broadcast to it."""
    step = torch.arange(-1, 2, device=y.device)
    y, x = y[..., None, None] + step[:, None], x[..., None, None] + step
    height, width = (v[..., None, None] if isinstance(v, Tensor) else v for v in (height, width))
    return y, x, (y >= 0) & (y < height) & (x >= 0) & (x < width)


def _cells(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N * H * W, C)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _gather(tables: Sequence[Tensor], rows: Tensor, within: Tensor) -> Tensor:
    """Rows (..., 3, 3) of tables (cells, C) one below the other -> (K, 9 C); zeros where not `within`."""
    table = torch.cat([*tables, tables[0].new_zeros(1, tables[0].shape[1])])
    rows = torch.where(within, rows, len(table) - 1).view(-1, 9)
    if table.is_cuda:  # where the gradient of an embedding counts its rows, and waits for the answer
        return table.index_select(0, rows.flatten()).view(len(rows), -1)
    return F.embedding(rows, table).flatten(1)

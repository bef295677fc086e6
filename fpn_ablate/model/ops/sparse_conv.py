"""3x3 convolutions at sampled cells only, exact and with their gradients.

Shape letters: N images, C channels, H x W cells, S sampled cells an image, K cells of all images. Cells are numbered row by row
over a map, and consecutively across levels where there are several.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fpn_ablate.model.ops.onednn import Conv2d, linear, to_cells

# A map is lazy if it has at least so many cells for each of `max_cells`. Where most cells are read, gathering them costs more
# than convolving the whole map. `max_cells` is about twice what is read: neighbourhoods overlap.
LAZY_RATIO = 1.25


class LazyMap:
    """A map (N, C, H, W) with a 3x3 convolution over it that is computed at the cells that are read.

    torch's functions, attributes and slices get the whole convolution.
    """

    def __init__(self, x: Tensor, conv: nn.Conv2d) -> None:
        self.x, self.conv = x, conv
        self.shape, self.device = x.shape, x.device
        self.whole: Tensor | None = None

    def at(self, cell: Tensor) -> Tensor:
        """Return the convolution (K, C) at cells (K,), which are numbered consecutively across images."""
        height, width = self.shape[-2:]
        image, in_map = cell // (height * width), cell % (height * width)
        y, x, inside = _neighbours(in_map // width, in_map % width, height, width)
        rows = (image[:, None, None] * height + y) * width + x
        return conv3x3_at(_gather([to_cells(self.x)], rows, inside), self.conv)

    def dense(self) -> Tensor:
        """Return the whole convolution (N, C, H, W)."""
        if self.whole is None:
            self.whole = Conv2d.forward(self.conv, self.x)
        return self.whole

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dense(), name)

    def __getitem__(self, key: Any) -> Tensor:
        return self.dense()[key]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*tree_map(_as_tensor, args), **tree_map(_as_tensor, kwargs or {}))


def _as_tensor(x: Any) -> Any:
    return x.dense() if isinstance(x, LazyMap) else x


class LazyConv2d(Conv2d):
    """A 3x3 convolution that returns large maps as `LazyMap` in training, for losses that read few cells.

    Attributes:
        max_cells: of each image at most so many cells are read.
    """

    max_cells: int

    def forward(self, x: Tensor) -> Tensor | LazyMap:
        large = x.shape[2] * x.shape[3] >= LAZY_RATIO * self.max_cells
        return LazyMap(x, self) if large and self.training and torch.is_grad_enabled() else super().forward(x)


def is_plain_3x3(conv: nn.Conv2d) -> bool:
    """Return whether `conv3x3_at` computes what `conv` does: 3x3, stride 1, padded with one 0."""
    sizes = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode
    return sizes == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")


def conv3x3_at(patches: Tensor, conv: nn.Conv2d) -> Tensor:
    """Apply a 3x3 convolution of stride 1 to the patches (K, 9 C) of `gather_3x3`: (K, out)."""
    return linear(patches, conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias)


def gather_3x3(maps: Sequence[Tensor | LazyMap], cell: Tensor) -> Tensor:
    """Return the 3x3 cells around each of `cell` (N, S), numbered consecutively across levels: (N * S, 9 C), 0 outside a map.

    Lazy maps are convolved here, each cell that several patches share only once.
    """
    sizes = _sizes(tuple(tuple(x.shape[-2:]) for x in maps), cell.device)
    ends = sizes.prod(1).cumsum(0)
    level = torch.searchsorted(ends, cell, right=True)
    height, width = sizes[level].unbind(-1)
    first = (ends - sizes.prod(1))[level]  # number of the level's first cell
    y, x, inside = _neighbours((cell - first) // width, (cell - first) % width, height, width)
    images = torch.arange(len(cell), device=cell.device)[:, None, None, None]
    height, width = height[..., None, None], width[..., None, None]
    rows = len(cell) * first[..., None, None] + (images * height + y) * width + x  # in the table of all cells, map by map
    tables, begin = [], 0
    for m in maps:
        if isinstance(m, LazyMap) and m.whole is None:
            end = begin + len(cell) * m.shape[-2] * m.shape[-1]
            in_map = inside & (rows >= begin) & (rows < end)
            unique_rows, position = rows[in_map].unique(return_inverse=True)
            tables.append(m.at(unique_rows - begin))
            rows = torch.where(rows >= end, rows - end + begin + len(unique_rows), rows)
            rows[in_map] = begin + position
        else:
            tables.append(to_cells(_as_tensor(m)))
        begin += len(tables[-1])
    return _gather(tables, rows, inside)


@lru_cache(maxsize=256)
def _sizes(sizes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Return the sizes of maps as a tensor, copied to the device once: each copy of numbers to a GPU waits for it."""
    with torch.inference_mode(False):  # an inference tensor could not be used in training later
        return torch.tensor(sizes, device=device)


def _neighbours(y: Tensor, x: Tensor, height: Tensor | int, width: Tensor | int) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows and columns of the 3x3 around cells (...), and which lie inside the map; all broadcast to (..., 3, 3)."""
    step = torch.arange(-1, 2, device=y.device)
    y, x = y[..., None, None] + step[:, None], x[..., None, None] + step
    height, width = (v[..., None, None] if isinstance(v, Tensor) else v for v in (height, width))
    return y, x, (y >= 0) & (y < height) & (x >= 0) & (x < width)


def _gather(tables: Sequence[Tensor], rows: Tensor, inside: Tensor) -> Tensor:
    """Gather rows (..., 3, 3) of concatenated tables (cells, C): (K, 9 C), 0 where not `inside`."""
    table = torch.cat([*tables, tables[0].new_zeros(1, tables[0].shape[1])])
    rows = torch.where(inside, rows, len(table) - 1).view(-1, 9)
    if table.is_cuda:  # the gradient of an embedding would count its rows there and wait for the result
        return table.index_select(0, rows.flatten()).view(len(rows), -1)
    return F.embedding(rows, table).flatten(1)

"""RoIAlign for CPUs, as one product with a sparse matrix over all levels at once.

torchvision's kernel scatters gradients value by value and channel by channel, which takes half of a training step on a CPU.
Here each bin is a row of 4 r^2 entries (r points a direction, 4 cells around each) over the cells of all maps. The forward
pass gathers rows of channels; so does the backward pass, with the transposed matrix. Equal to torchvision's but for rounding.

Shape letters: N images, L levels, Hl x Wl cells of level l, M RoIs, C channels, S x S bins, r points a bin and direction.
"""

from collections.abc import Sequence

import numpy as np
import scipy.sparse
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fpn_ablate.model.heads.roi_pooler import RoIPooler
from fpn_ablate.model.precision import full_precision
from fpn_ablate.structures.levels import Features


class FastRoIPooler(RoIPooler):
    """`RoIPooler` that pools from all levels at once, where the number of points a bin is fixed."""

    def pool_from(self, features: Features, image: Tensor, level_idxs: Tensor, boxes: Tensor) -> Tensor:
        if self.pooling == "pool" or not self.sampling_ratio:
            return super().pool_from(features, image, level_idxs, boxes)
        maps, strides = zip(*((full_precision(features[level.name]), level.stride) for level in self.levels), strict=True)
        boxes, aligned = boxes.to(maps[0].dtype), self.pooling == "align_v2"
        return roi_align(maps, strides, image, level_idxs, boxes, self.resolution, self.sampling_ratio, aligned)


def roi_align(
    features: Sequence[Tensor],
    strides: Sequence[int],
    image: Tensor,
    level: Tensor,
    boxes: Tensor,
    resolution: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """Pool boxes (M, 4) to (M, C, S, S) from maps (N, C, Hl, Wl) of `strides`: each from its `image` (M,) and `level` (M,).

    Args:
        resolution: S.
        sampling_ratio: r, at least 1.
        aligned: shift by half a cell (detectron2's).
    """
    n, c = features[0].shape[:2]
    with torch.no_grad():
        sizes = torch.tensor([x.shape[-2:] for x in features])
        first = n * (sizes.prod(1).cumsum(0) - sizes.prod(1))  # row of each map's first cell in the table of all cells
        height, width = sizes[level].unbind(1)
        scaled = boxes / torch.tensor(strides, dtype=boxes.dtype)[level][:, None] - 0.5 * aligned
        start, extent = scaled[:, :2], scaled[:, 2:] - scaled[:, :2]
        if not aligned:
            extent = extent.clamp(min=1)
        x, wx = _along(start[:, 0], extent[:, 0], width, resolution, sampling_ratio)
        y, wy = _along(start[:, 1], extent[:, 1], height, resolution, sampling_ratio)
        row = (first[level] + image * height * width)[:, None, None] + y * width[:, None, None]
        # All pairs of a row and a column of each bin, repeated to equal length before they are added: long inner loops.
        entries = 2 * sampling_ratio
        rows, columns = row.int().repeat_interleave(entries, 2), x.int().repeat(1, 1, entries)
        cells = rows[:, :, None] + columns[:, None]
        wy, wx = (wy / sampling_ratio**2).repeat_interleave(entries, 2), wx.repeat(1, 1, entries)
        weights = wy[:, :, None] * wx[:, None]
    shape = len(boxes) * resolution**2, 4 * sampling_ratio**2
    # A map in channels_last is already a table of cells.
    table = torch.cat([x.permute(0, 2, 3, 1).reshape(-1, c) for x in features])
    pooled = _Gather.apply(table, cells.view(shape), weights.view(shape))
    return pooled.view(len(boxes), resolution, resolution, c).permute(0, 3, 1, 2)


def _along(start: Tensor, extent: Tensor, count: Tensor, resolution: int, ratio: int) -> tuple[Tensor, Tensor]:
    """Return the indices and weights (M, S, 2 r) of the two cells around each point, along one axis of `count` cells."""
    # In the order of operations of torchvision's kernel, so that points are rounded alike.
    size, last = (extent / resolution)[:, None, None], (count - 1)[:, None]
    point = start[:, None, None] + torch.arange(resolution)[:, None] * size + (torch.arange(ratio) + 0.5) * size / ratio
    point = point.flatten(1)
    inside = (point >= -1) & (point <= count[:, None])  # a point further out counts as 0
    point = point.clamp(min=0)
    lower = torch.minimum(point.long(), last)
    fraction = torch.where(lower < last, point - lower, 0)
    cells = torch.stack([lower, torch.minimum(lower + 1, last)], -1)
    weights = torch.stack([1 - fraction, fraction], -1) * inside[..., None]
    shape = len(start), resolution, 2 * ratio
    return cells.view(shape), weights.view(shape)


class _Gather(torch.autograd.Function):
    """Weighted sums (bins, C) of rows of a table (cells, C)."""

    @staticmethod
    def forward(ctx, table: Tensor, cells: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(cells, weights)
        ctx.count = len(table)
        return F.embedding_bag(cells, table, per_sample_weights=weights, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        cells, weights = ctx.saved_tensors
        bins, entries = cells.shape
        ends = np.arange(0, bins * entries + 1, entries, dtype=np.int32)
        matrix = scipy.sparse.csr_array((weights.numpy().ravel(), cells.numpy().ravel(), ends), shape=(bins, ctx.count))
        transposed = matrix.tocsc()
        rows, begins, values = (torch.from_numpy(a) for a in (transposed.indices, transposed.indptr[:-1], transposed.data))
        return F.embedding_bag(rows, grad.contiguous(), begins, per_sample_weights=values, mode="sum"), None, None

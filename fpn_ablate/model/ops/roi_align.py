"""RoIAlign for CPUs, as one product with a sparse matrix over all levels at once.

torchvision's kernel scatters gradients value by value and channel by channel, which is half of a training step on a CPU. Here
each bin is a row of 4 r^2 entries (r points a direction, 4 cells around each) over the cells of all maps; the forward pass
gathers rows of channels, and so does the backward pass, by the transposed matrix. Equal to torchvision's but for rounding.

N images, L levels, M RoIs, C channels, S x S bins.
"""

from collections.abc import Sequence

import numpy as np
import scipy.sparse
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


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
    """(M, C, S, S) from maps (N, C, Hl, Wl) of `strides`, for boxes (M, 4) in `image` (M,) at `level` (M,).

    Args:
        resolution: S.
        sampling_ratio: r, at least 1.
        aligned: less half a cell (detectron2's).
    """
    n, c = features[0].shape[:2]
    with torch.no_grad():
        sizes = torch.tensor([x.shape[-2:] for x in features])
        first = n * (sizes.prod(1).cumsum(0) - sizes.prod(1))  # each map's, in the table of all cells
        height, width = sizes[level].unbind(1)
        scaled = boxes / torch.tensor(strides, dtype=boxes.dtype)[level][:, None] - 0.5 * aligned
        start, extent = scaled[:, :2], scaled[:, 2:] - scaled[:, :2]
        if not aligned:
            extent = extent.clamp(min=1)
        x, wx = _along(start[:, 0], extent[:, 0], width, resolution, sampling_ratio)
        y, wy = _along(start[:, 1], extent[:, 1], height, resolution, sampling_ratio)
        row = (first[level] + image * height * width)[:, None, None] + y * width[:, None, None]
        # All pairs of a row and a column of each bin; side by side before they meet, for long inner loops.
        entries = 2 * sampling_ratio
        rows, columns = row.int().repeat_interleave(entries, 2), x.int().repeat(1, 1, entries)
        cells = rows[:, :, None] + columns[:, None]
        wy, wx = (wy / sampling_ratio**2).repeat_interleave(entries, 2), wx.repeat(1, 1, entries)
        weights = wy[:, :, None] * wx[:, None]
    shape = len(boxes) * resolution**2, 4 * sampling_ratio**2
    # A map in channels_last is a table of cells as it is.
    table = torch.cat([x.permute(0, 2, 3, 1).reshape(-1, c) for x in features])
    pooled = _Gather.apply(table, cells.view(shape), weights.view(shape))
    return pooled.view(len(boxes), resolution, resolution, c).permute(0, 3, 1, 2)


def _along(start: Tensor, extent: Tensor, count: Tensor, resolution: int, ratio: int) -> tuple[Tensor, Tensor]:
    """Along one axis of `count` cells: indices and weights (M, S, 2 r) of the two cells around each point."""
    # In the kernel's order of operations, so that points are rounded alike.
    size, last = (extent / resolution)[:, None, None], (count - 1)[:, None]
    point = start[:, None, None] + torch.arange(resolution)[:, None] * size + (torch.arange(ratio) + 0.5) * size / ratio
    point = point.flatten(1)
    inside = (point >= -1) & (point <= count[:, None])  # a point further out counts as 0
    point = point.clamp(min=0)
    low = torch.minimum(point.long(), last)
    share = torch.where(low < last, point - low, 0)
    cells = torch.stack([low, torch.minimum(low + 1, last)], -1)
    weights = torch.stack([1 - share, share], -1) * inside[..., None]
    shape = len(start), resolution, 2 * ratio
    return cells.view(shape), weights.view(shape)


class _Gather(torch.autograd.Function):
    """Rows of a table (cells, C), weighed and summed: (bins, C)."""

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
        turned = matrix.tocsc()
        places, begins, shares = (torch.from_numpy(a) for a in (turned.indices, turned.indptr[:-1], turned.data))
        return F.embedding_bag(places, grad.contiguous(), begins, per_sample_weights=shares, mode="sum"), None, None

"""RoI pooling over any set of levels (Sec. 4.2).

Shape letters: N images, P RoIs an image, L levels, C channels, S x S bins. Boxes are XYXY in pixels of the network's input.
"""

from collections.abc import Sequence

import torch
import torchvision.ops
from torch import Tensor, nn

from fpn_ablate.model.boxes import area
from fpn_ablate.model.precision import full_precision
from fpn_ablate.structures.levels import Features, Level, common_width

COARSEST_STRIDE = 32


def roi_level(boxes: Tensor, canonical_level: int = 4, canonical_box_size: float = 224) -> Tensor:
    """Return the level (...) of boxes (..., 4) by Eq. 1: k = floor(k0 + log2(sqrt(w h) / canonical_box_size)), int64.

    k is not yet limited to the levels that exist. A box of no area gets a very low one. 1e-6 keeps a box of exactly a power of
    two on the upper side (Detectron).
    """
    scale = area(boxes).clamp(min=1e-12).sqrt() / canonical_box_size
    return torch.floor(canonical_level + torch.log2(scale) + 1e-6).long()


class RoIPooler(nn.Module):
    """Pool each RoI from the level that Eq. 1 gives it, or from the only level.

    Args:
        levels: of the neck. Those coarser than P5 serve the RPN alone (Sec. 4.1) and are left out.
        resolution: S.
        pooling: "pool" (RoIPool, the paper's), "align" (RoIAlign) or "align_v2" (detectron2's RoIAlign, shifted by half a cell,
            since a cell's value belongs to its centre).
        sampling_ratio: points of RoIAlign in each bin and direction; 0: as many as the bin has cells.
        canonical_level, canonical_box_size: k0 and the 224 of Eq. 1, in pixels of the network's input.
        all_levels: pool each RoI from every level (adaptive feature pooling, PANet, Sec. 3.2); the box head merges them.

    Raises:
        UserError: the levels' widths differ.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        resolution: int,
        pooling: str = "align",
        sampling_ratio: int = 2,
        canonical_level: int = 4,
        canonical_box_size: float = 224,
        all_levels: bool = False,
    ) -> None:
        super().__init__()
        self.levels = [level for level in levels if level.stride <= COARSEST_STRIDE]
        common_width(self.levels, "the second stage")
        self.resolution, self.pooling, self.sampling_ratio = resolution, pooling, sampling_ratio
        self.canonical_level, self.canonical_box_size = canonical_level, canonical_box_size
        self.all_levels = all_levels

    @property
    def in_channels(self) -> int:
        return self.levels[0].channels  # of all of them

    @property
    def views(self) -> int:
        """Return how many pooled maps each RoI has."""
        return len(self.levels) if self.all_levels else 1

    def assign(self, boxes: Tensor) -> Tensor:
        """Return the index in `levels` (...) of each of the boxes (..., 4)."""
        if len(self.levels) == 1:
            return torch.zeros(boxes.shape[:-1], dtype=torch.int64, device=boxes.device)
        finest = int(self.levels[0].name[1:])
        k = roi_level(boxes, self.canonical_level, self.canonical_box_size)
        return (k - finest).clamp(0, len(self.levels) - 1)

    def forward(self, features: Features, boxes: Tensor) -> Tensor:
        """Pool boxes (N, P, 4) to (N * P, C, S, S), in the order of the boxes whatever their levels."""
        n, p = boxes.shape[:2]
        image = torch.arange(n, device=boxes.device).repeat_interleave(p)
        return self.pool(features, image, boxes.flatten(0, 1))

    def pool(self, features: Features, image: Tensor, boxes: Tensor) -> Tensor:
        """Pool boxes (M, 4), each from its `image` (M,), to (M, C, S, S); from all levels to (L * M, C, S, S)."""
        if not self.all_levels:
            return self.pool_from(features, image, self.assign(boxes), boxes)
        level_idxs = torch.arange(self.views, device=boxes.device).repeat_interleave(len(boxes))
        return self.pool_from(features, image.repeat(self.views), level_idxs, boxes.repeat(self.views, 1))

    def pool_from(self, features: Features, image: Tensor, level_idxs: Tensor, boxes: Tensor) -> Tensor:
        """Pool boxes (M, 4), each from its `image` (M,) and level (M,), to (M, C, S, S)."""
        rois = torch.cat([image[:, None].to(boxes.dtype), boxes], 1)
        if len(self.levels) == 1:
            return self._pool(features[self.levels[0].name], rois, self.levels[0].stride)
        order = level_idxs.argsort(stable=True)
        counts = (level_idxs[:, None] == torch.arange(len(self.levels), device=boxes.device)).sum(0).tolist()
        level_rois = zip(self.levels, rois[order].split(counts), strict=True)
        pooled = torch.cat([self._pool(features[level.name], own, level.stride) for level, own in level_rois])
        return torch.empty_like(pooled).index_copy(0, order, pooled)

    def _pool(self, x: Tensor, rois: Tensor, stride: int) -> Tensor:
        x = full_precision(x)
        rois = rois.to(x.dtype)
        if self.pooling == "pool":
            return torchvision.ops.roi_pool(x, rois, self.resolution, 1 / stride)
        return torchvision.ops.roi_align(
            x, rois, self.resolution, 1 / stride, self.sampling_ratio, aligned=self.pooling == "align_v2"
        )

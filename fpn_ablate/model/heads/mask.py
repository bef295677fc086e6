"""Mask branch of the second stage: Mask R-CNN (He et al. 2017, Sec. 3).

Shape letters: N images, M RoIs of the batch that get a mask, C channels, B x B bins of a RoI's features, R x R pixels of a
mask. Labels are 1..K.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpn_ablate.config.parts import MaskConfig
from fpn_ablate.model.heads.roi_pooler import RoIPooler
from fpn_ablate.model.precision import full_precision
from fpn_ablate.structures.masks import ObjectMasks, crop


class MaskBranch(nn.Module):
    """Head and loss of masks.

    Args:
        pooler: of its own; None: it reads the box head's maps (`BoxHead.mask_features`).
    """

    def __init__(self, head: nn.Module, pooler: RoIPooler | None, config: MaskConfig) -> None:
        super().__init__()
        self.head, self.pooler, self.config = head, pooler, config

    def forward(self, maps: Tensor, labels: Tensor) -> Tensor:
        """Return the logits (M, R, R) of the masks of classes `labels` (M,) from features (M, C, B, B)."""
        logits = full_precision(self.head(maps))
        if self.config.class_agnostic:
            return logits[:, 0]
        return logits[torch.arange(len(labels), device=labels.device), labels - 1]

    def losses(
        self, maps: Tensor, labels: Tensor, masks: Sequence[ObjectMasks], image: Tensor, objects: Tensor, boxes: Tensor
    ) -> dict[str, Tensor]:
        """Return `mask`: the mean cross-entropy over the pixels of M positive RoIs, on the channel of the object's class alone.

        Args:
            maps, labels: as in `forward`.
            masks, image, objects, boxes: as in `targets`.
        """
        logits = self(maps, labels)
        targets = self.targets(masks, image, objects, boxes, logits.shape[-1]).to(logits)
        loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
        return {"mask": loss / max(logits.numel(), 1)}  # without positives a gradient of 0

    def targets(self, masks: Sequence[ObjectMasks], image: Tensor, objects: Tensor, boxes: Tensor, side: int) -> Tensor:
        """Cut the masks of objects to RoIs.

        Args:
            masks, image, objects, boxes: as in `structures.masks.crop`.
            side: R.

        Returns:
            (M, R, R): 1 where the object covers half of a bin or more, else 0. With config.targets "torchvision" the share that
            it covers.
        """
        exact = self.config.targets == "exact"
        share = crop(masks, image, objects, boxes, side, aligned=exact)
        return (share >= 0.5).to(share.dtype) if exact else share

    def init_parameter(self, layer: nn.Module, parameter: Tensor, generator: torch.Generator) -> bool:
        """Draw the last weights Gaussian with 0.001 (detectron2)."""
        if is_last := parameter.dim() > 1 and layer is self.head.logits:
            nn.init.normal_(parameter, std=0.001, generator=generator)
        return is_last

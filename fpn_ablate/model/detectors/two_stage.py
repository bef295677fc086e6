"""Two-stage detector on one page: images -> features -> levels -> proposals -> detections.

Shape letters: N images of H x W pixels.
"""

import torch
from torch import Tensor, nn

from fpn_ablate.model.backbones.base import MEAN, STD, Backbone
from fpn_ablate.model.heads.roi import RoIHeads
from fpn_ablate.model.heads.rpn import RPN
from fpn_ablate.model.necks.fpn import FPN
from fpn_ablate.model.ops.constants import constant
from fpn_ablate.structures.instances import BatchDetections, Proposals, Targets
from fpn_ablate.structures.levels import Features

Triple = tuple[float, float, float]


def normalise(images: Tensor, sizes: Tensor, mean: Triple = MEAN, std: Triple = STD) -> Tensor:
    """Normalise images (N, 3, H, W) in 0..255 to mean 0 and deviation 1, in torch's default type; outside `sizes` (N, 2) to 0.

    Args:
        mean, std: of the images that the backbone was or is trained with, RGB in 0..1.
    """
    mean, std = (constant(tuple(v), images.device, torch.get_default_dtype())[:, None, None] * 255 for v in (mean, std))
    x = (images - mean) / std
    inside_y = torch.arange(images.shape[2], device=images.device) < sizes[:, :1]
    inside_x = torch.arange(images.shape[3], device=images.device) < sizes[:, 1:]
    return x * (inside_y[:, None, :, None] & inside_x[:, None, None, :])


class Detector(nn.Module):
    """Backbone, neck, and the heads that the task trains: RPN, second stage or both.

    Convolutions may run in bf16 under autocast; matching, boxes, NMS and losses are fp32.
    """

    def __init__(self, backbone: Backbone, neck: nn.Module, rpn: RPN | None, roi: RoIHeads | None) -> None:
        super().__init__()
        self.backbone, self.neck, self.rpn, self.roi = backbone, neck, rpn, roi

    def features(self, images: Tensor, sizes: Tensor, **neck_options: int) -> Features:
        """Return the neck's levels of images (N, 3, H, W) in 0..255 of `sizes` (N, 2)."""
        backbone = self.backbone
        return self.neck(backbone(normalise(images, sizes, backbone.mean, backbone.std)), **neck_options)

    def features_to_train(self, images: Tensor, sizes: Tensor) -> Features:
        """Return `features` for `losses`. Where an RPN alone reads them, at sampled cells, large maps are lazy convolutions."""
        sparse = self.roi is None and isinstance(self.neck, FPN) and not images.is_cuda  # a GPU is fast over all cells
        return self.features(images, sizes, **({"max_cells": len(images) * self.rpn.max_sampled_cells} if sparse else {}))

    def losses(
        self, images: Tensor, targets: Targets, generator: torch.Generator, proposals: Proposals | None = None
    ) -> dict[str, Tensor]:
        """Return the named losses of a training batch; `generator` draws the samples.

        The second stage learns from `proposals`, or from the RPN's own, through which it sends no gradient back (Faster R-CNN's
        approximate joint training).
        """
        features, losses = self.features_to_train(images, targets.sizes), {}
        if self.rpn:
            losses |= self.rpn.losses(features, targets, generator)
            if self.roi and proposals is None:
                with torch.no_grad():
                    proposals = self._propose(features, targets.sizes, to_train=True)
        if self.roi:
            assert proposals is not None, "a detector without an RPN needs proposals"
            losses |= self.roi.losses(features, proposals, targets, generator)
        return losses

    @torch.no_grad()
    def propose(self, images: Tensor, sizes: Tensor, to_train: bool = False) -> Proposals:
        """Return proposals in pixels of `images`: as many as a second stage is trained on (`to_train`) or tested on."""
        return self._propose(self.features(images, sizes), sizes, to_train)

    @torch.no_grad()
    def detect(self, images: Tensor, sizes: Tensor, proposals: Proposals | None = None) -> BatchDetections:
        """Return detections in pixels of `images`, from `proposals` or from the RPN's own."""
        features = self.features(images, sizes)
        if proposals is None:
            proposals = self._propose(features, sizes, to_train=False)
        return self.roi.detect(features, proposals, sizes)

    def _propose(self, features: Features, sizes: Tensor, to_train: bool) -> Proposals:
        raw = self.rpn(features)
        with torch.autocast(sizes.device.type, enabled=False):
            return self.rpn.propose(*raw, sizes, to_train)

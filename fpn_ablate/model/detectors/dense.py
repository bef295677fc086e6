"""Detector of one stage on one page: images -> features -> levels -> detections.

Shape letters: N images of H x W pixels.
"""

import torch
from torch import Tensor

from fpn_ablate.model.backbones.base import Backbone
from fpn_ablate.model.detectors.two_stage import Detector, Generators
from fpn_ablate.model.heads.dense import DenseHead
from fpn_ablate.model.necks.base import Neck
from fpn_ablate.structures.instances import BatchDetections, Proposals, Targets


class DenseDetector(Detector):
    """Backbone, neck and dense head: a detector with neither RPN nor second stage."""

    detects = True

    def __init__(self, backbone: Backbone, neck: Neck, head: DenseHead) -> None:
        super().__init__(backbone, neck, rpn=None, roi=None)
        self.head = head

    @property
    def num_classes(self) -> int:
        return self.head.num_classes

    def losses(
        self, images: Tensor, targets: Targets, generators: Generators, proposals: Proposals | None = None
    ) -> dict[str, Tensor]:
        """Return the named losses of a training batch; the generator "dense" draws samples, where a head does."""
        return self.head.losses(self.features(images, targets.sizes), targets, generators("dense"))

    @torch.no_grad()
    def propose(self, images: Tensor, sizes: Tensor, to_train: bool = False) -> Proposals:
        """Return proposals in pixels of `images`; no second stage learns from them, so `to_train` changes nothing."""
        return self.head.propose(self.features(images, sizes), sizes)

    @torch.no_grad()
    def detect(self, images: Tensor, sizes: Tensor, proposals: Proposals | None = None) -> BatchDetections:
        """Return detections in pixels of `images`."""
        return self.head.detect(self.features(images, sizes), sizes)

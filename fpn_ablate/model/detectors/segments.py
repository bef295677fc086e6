"""Detector of segment proposals on one page: images -> features -> levels -> proposals with masks.

Shape letters: N images of H x W pixels.
"""

import torch
from torch import Tensor

from fpn_ablate.model.backbones.base import Backbone
from fpn_ablate.model.detectors.two_stage import Detector, Generators
from fpn_ablate.model.heads.segments import SegmentHead
from fpn_ablate.model.necks.base import Neck
from fpn_ablate.structures.instances import Proposals, Targets


class SegmentProposer(Detector):
    """Backbone, neck and segment head: a detector with neither RPN nor second stage."""

    def __init__(self, backbone: Backbone, neck: Neck, segments: SegmentHead) -> None:
        super().__init__(backbone, neck, rpn=None, roi=None)
        self.segments = segments

    def losses(
        self, images: Tensor, targets: Targets, generators: Generators, proposals: Proposals | None = None
    ) -> dict[str, Tensor]:
        """Return the named losses of a training batch; the generator "segments" draws the samples."""
        return self.segments.losses(self.features(images, targets.sizes), targets, generators("segments"))

    @torch.no_grad()
    def propose(self, images: Tensor, sizes: Tensor, to_train: bool = False) -> Proposals:
        """Return segment proposals in pixels of `images`; no second stage learns from them, so `to_train` changes nothing."""
        return self.segments.propose(self.features(images, sizes), sizes)

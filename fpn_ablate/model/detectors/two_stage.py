"""Two-stage detector on one page: images -> features -> levels -> proposals -> detections.

Shape letters: N images of H x W pixels.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fpn_ablate.model.backbones.base import Backbone
from fpn_ablate.model.heads.roi import RoIHeads
from fpn_ablate.model.heads.rpn import RPN
from fpn_ablate.model.necks.base import Neck
from fpn_ablate.structures.instances import BatchDetections, Proposals, Targets
from fpn_ablate.structures.levels import Features

# Make a generator that is used for one purpose, as "rpn".
Generators = Callable[[str], torch.Generator]


class Detector(nn.Module):
    """Backbone, neck, and the heads that the task trains: RPN, second stage or both.

    Convolutions may run in bf16 under autocast; matching, boxes, NMS and losses are fp32.

    Attributes:
        detects: it returns detections; False: proposals alone.
        num_classes: K of its detections; None without them.
    """

    def __init__(self, backbone: Backbone, neck: Neck, rpn: RPN | None, roi: RoIHeads | None) -> None:
        super().__init__()
        self.backbone, self.neck, self.rpn, self.roi = backbone, neck, rpn, roi

    @property
    def detects(self) -> bool:
        return self.roi is not None

    @property
    def num_classes(self) -> int | None:
        return self.roi.predictor.scores.out_features - 1 if self.roi else None

    @property
    def backbone_parts(self) -> dict[str, nn.Module]:
        """Return the backbone, and the stage of it that the box head holds, by the prefix of their names in its weights."""
        stage = self.roi and self.roi.box_head.backbone_stage
        return {"": self.backbone} | ({f"stages.{stage}.": self.roi.box_head.stage} if stage else {})

    def features(self, images: Tensor, sizes: Tensor) -> Features:
        """Return the neck's levels of images (N, 3, H, W) in 0..255 of `sizes` (N, 2)."""
        return self.neck(self.backbone(self.backbone.normalise(images, sizes)))

    def losses(
        self, images: Tensor, targets: Targets, generators: Generators, proposals: Proposals | None = None
    ) -> dict[str, Tensor]:
        """Return the named losses of a training batch; the generators "rpn" and "roi" draw the samples.

        The second stage learns from `proposals`, or from the RPN's own, through which it sends no gradient back (Faster R-CNN's
        approximate joint training).
        """
        features, losses = self.features(images, targets.sizes), {}
        if self.rpn:
            losses |= self.rpn.losses(features, targets, generators("rpn"))
            if self.roi and proposals is None:
                with torch.no_grad():
                    proposals = self._propose_to_roi(features, targets.sizes, to_train=True)
        if self.roi:
            assert proposals is not None, "a detector without an RPN needs proposals"
            losses |= self.roi.losses(features, proposals, targets, generators("roi"))
        return losses

    @torch.no_grad()
    def propose(self, images: Tensor, sizes: Tensor, to_train: bool = False) -> Proposals:
        """Return proposals in pixels of `images`: as many as the RPN leaves to train a second stage (`to_train`) or to test."""
        return self.rpn.propose(*self.rpn(self.features(images, sizes)), sizes, to_train)

    @torch.no_grad()
    def detect(self, images: Tensor, sizes: Tensor, proposals: Proposals | None = None) -> BatchDetections:
        """Return detections in pixels of `images`, from `proposals` or from the RPN's own."""
        features = self.features(images, sizes)
        if proposals is None:
            proposals = self._propose_to_roi(features, sizes, to_train=False)
        return self.roi.detect(features, proposals, sizes)

    def _propose_to_roi(self, features: Features, sizes: Tensor, to_train: bool) -> Proposals:
        """Return no more proposals than the second stage uses."""
        topk = self.roi.config.proposals[0 if to_train else 1]
        return self.rpn.propose(*self.rpn(features), sizes, to_train, topk)

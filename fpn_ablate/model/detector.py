"""The whole detector on one page: images -> features -> levels -> proposals (and, in a two-stage task, detections)."""

import torch
from torch import Tensor, nn

from fpn_ablate.model.levels import Features
from fpn_ablate.model.rpn import RPN, Proposals, Targets

# ImageNet's statistics, RGB in 0..1; every backbone here was or is trained with them.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalise(images: Tensor, sizes: Tensor) -> Tensor:
    """uint8 images (N, 3, H, W) -> fp32, mean 0 and deviation 1; what lies outside `sizes` (N, 2) becomes 0."""
    mean, std = (torch.tensor(v, device=images.device)[:, None, None] * 255 for v in (MEAN, STD))
    x = (images - mean) / std
    inside_y = torch.arange(images.shape[2], device=images.device) < sizes[:, :1]
    inside_x = torch.arange(images.shape[3], device=images.device) < sizes[:, 1:]
    return x * (inside_y[:, None, :, None] & inside_x[:, None, None, :])


class Detector(nn.Module):
    """Backbone, neck and RPN. Convolutions may run in bf16 under autocast; matching, boxes, NMS and losses are fp32."""

    def __init__(self, backbone: nn.Module, neck: nn.Module, rpn: RPN) -> None:
        super().__init__()
        self.backbone, self.neck, self.rpn = backbone, neck, rpn

    def features(self, images: Tensor, sizes: Tensor) -> Features:
        """uint8 images (N, 3, H, W) of `sizes` (N, 2) -> the neck's levels."""
        return self.neck(self.backbone(normalise(images, sizes)))

    def losses(self, images: Tensor, targets: Targets, generator: torch.Generator) -> dict[str, Tensor]:
        """Named losses of a training batch; `generator` draws the samples."""
        raw = self.rpn(self.features(images, targets.sizes))
        with torch.autocast(images.device.type, enabled=False):
            return self.rpn.losses(*raw, targets, generator)

    @torch.no_grad()
    def propose(self, images: Tensor, sizes: Tensor) -> Proposals:
        """Proposals in pixels of `images`."""
        raw = self.rpn(self.features(images, sizes))
        with torch.autocast(images.device.type, enabled=False):
            return self.rpn.propose(*raw, sizes)

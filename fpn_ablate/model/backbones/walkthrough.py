"""A plain network for teaching: a 3x3 convolution, ReLU and a 3x3 max pooling, five times."""

from torch import nn

from fpn_ablate.config import parts
from fpn_ablate.model.backbones.base import STAGES, Backbone

WIDTHS = (64, 256, 512, 1024, 2048)


def walkthrough(config: parts.PlainBackbone) -> Backbone:
    """Build the network: maps of 112, 56, 28, 14 and 7 cells at 224 pixels. It has no norm."""
    widths = [round(config.width * width) for width in WIDTHS]
    stages = {
        name: nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
        for name, before, after in zip(STAGES, (3, *widths), widths, strict=False)
    }
    return Backbone(stages, tuple(widths[1:]), runs_in_order=True)

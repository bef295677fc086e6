"""Darknet-53, the backbone of YOLOv3 (Redmon and Farhadi 2018, arXiv:1804.02767, Table 1)."""

from torch import Tensor, nn

from fpn_ablate.config import parts
from fpn_ablate.model.backbones.base import STAGES, Backbone

WIDTHS, BLOCKS = (64, 128, 256, 512, 1024), (1, 2, 8, 8, 4)  # of the stages of strides 2, 4, 8, 16, 32


def _convolution(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Return a convolution, batch norm and leaky ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.LeakyReLU(0.1, inplace=True),
    )


class Residual(nn.Module):
    """1x1 to half the width, 3x3 back, and the input added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce, self.expand = _convolution(channels, channels // 2, 1), _convolution(channels // 2, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.expand(self.reduce(x))


def darknet53(config: parts.PlainBackbone) -> Backbone:
    """Build Darknet-53. The stem is its first convolution and the stage of stride 2."""
    first, *widths = (2 * round(config.width * width / 2) for width in (WIDTHS[0] // 2, *WIDTHS))
    stages: dict[str, nn.Module] = {"stem": nn.Sequential(_convolution(3, first, 3))}
    before = first
    for name, width, blocks in zip(("stem", *STAGES[1:]), widths, BLOCKS, strict=True):
        layers = [_convolution(before, width, 3, stride=2), *(Residual(width) for _ in range(blocks))]
        stages[name] = nn.Sequential(*stages.get(name, ()), *layers)
        before = width
    return Backbone(stages, tuple(widths[1:]), runs_in_order=True)

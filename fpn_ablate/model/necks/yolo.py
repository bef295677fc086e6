"""YOLOv3's neck: upsampled maps are concatenated, not added (Redmon and Farhadi 2018, arXiv:1804.02767; darknet's yolov3.cfg).

Shape letters: N images, d channels, Hi x Wi cells of level i.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpn_ablate.config.necks import Norm, YOLONeck
from fpn_ablate.model.necks.base import Neck
from fpn_ablate.model.necks.layers import convolution, downsample, upsample
from fpn_ablate.structures.levels import Features, Level


class YOLO(Neck):
    """Five convolutions on the coarsest map; then, level by level, halve the width, upsample, concatenate, five more.

    YOLOv3 reads C3..C5, and its outputs differ in width. Here 1x1 convolutions bring them to one width, so that the heads stay
    the same, and coarser levels are max-pooled.

    Args:
        in_levels: C2..C5, finest first.
        config: its switches.
            channels: d. Inside, C5's level is 2d wide, and each finer one half as wide (512, 256, 128 at 256).
            levels: "p3-p7" (as YOLOv3 reads) or "p2-p6".
            fuse: "concat", or "sum" behind a 1x1 convolution on the backbone's map, as in FPN.
            norm: behind each convolution; batch norm in the paper. Leaky ReLU follows.
    """

    has_lateral = has_top_down = True

    def __init__(self, in_levels: Sequence[Level], config: YOLONeck) -> None:
        super().__init__()
        names = list(config.level_names)
        read = [level for level in in_levels if level.name.replace("c", "p") in names]
        widths = [max(1, 4 * config.channels >> n) for n in range(len(read), 0, -1)]
        self.fuse, norm = config.fuse, config.norm
        self.read = [level.name.replace("c", "p") for level in read]
        self.pooled = names[len(read) :]
        self.blocks, self.reduce, self.lateral, self.output = (nn.ModuleDict() for _ in range(4))
        for n, (name, level, width) in enumerate(zip(self.read, read, widths, strict=True)):
            coarsest = n == len(read) - 1
            if not coarsest:
                self.reduce[name] = leaky(widths[n + 1], width, 1, norm)
            merges_by_sum = config.fuse == "sum" and not coarsest
            if merges_by_sum:
                self.lateral[name] = leaky(level.channels, width, 1, norm)
            into = width if merges_by_sum else level.channels + (0 if coarsest else width)
            self.blocks[name] = five(into, width, norm)
            self.output[name] = convolution(width, config.channels, 1)
        self.levels = tuple(Level(n, config.channels) for n in names)

    def forward(self, features: Features) -> Features:
        """Return the levels (N, d, Hi, Wi), finest first."""
        *finer, coarsest = self.read
        inner = {coarsest: self.blocks[coarsest](features[coarsest.replace("p", "c")])}
        coarse = coarsest
        for name in reversed(finer):
            x = features[name.replace("p", "c")]
            above = upsample(self.reduce[name](inner[coarse]), x.shape[-2:])
            merged = self.lateral[name](x) + above if self.fuse == "sum" else torch.cat([above, x], 1)
            inner[name] = self.blocks[name](merged)
            coarse = name
        out = {name: self.output[name](inner[name]) for name in self.read}
        for name in self.pooled:
            out[name] = downsample(out[coarsest])
            coarsest = name
        return out


class LeakyConv(nn.Sequential):
    """Convolution, norm, leaky ReLU of slope 0.1."""

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(super().forward(x), 0.1)


def leaky(in_channels: int, out_channels: int, kernel: int, norm: Norm) -> LeakyConv:
    """Return a convolution with its norm and a leaky ReLU."""
    return LeakyConv(convolution(in_channels, out_channels, kernel, norm))


def five(in_channels: int, width: int, norm: Norm) -> nn.Sequential:
    """Return 1x1, 3x3, 1x1, 3x3, 1x1 convolutions: `width`, twice as wide, and so on; the last one is `width` wide."""
    return nn.Sequential(
        leaky(in_channels, width, 1, norm),
        *(layer for _ in range(2) for layer in (leaky(width, 2 * width, 3, norm), leaky(2 * width, width, 1, norm))),
    )

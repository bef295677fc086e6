"""Layers that necks share: convolutions with a norm, resampling between levels, and the levels that they start from.

Shape letters: N images, C channels, d the neck's width, Hi x Wi cells of level i.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpn_ablate.config.necks import Norm
from fpn_ablate.model.layers import group_norm
from fpn_ablate.structures.levels import Features, Level

ACTIVATIONS = {"none": nn.Identity, "relu": nn.ReLU, "swish": nn.SiLU}


class NormConv2d(nn.Conv2d):
    """Convolution without a bias, followed by a norm."""

    def __init__(self, *args: int, norm: nn.Module, **kwargs: int) -> None:
        super().__init__(*args, bias=False, **kwargs)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


def convolution(in_channels: int, out_channels: int, kernel: int, norm: Norm = "none", stride: int = 1) -> nn.Conv2d:
    """Return a padded convolution, with a bias or with a norm behind it."""
    shape = (in_channels, out_channels, kernel, stride, kernel // 2)
    return nn.Conv2d(*shape) if norm == "none" else NormConv2d(*shape, norm=norm_layer(norm, out_channels))


def separable_convolution(channels: int, norm: Norm = "none") -> nn.Sequential:
    """Return a 3x3 convolution of each channel by itself, then a 1x1 with the bias or the norm."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False), convolution(channels, channels, 1, norm)
    )


def norm_layer(norm: Norm, channels: int) -> nn.Module:
    """Return a batch norm or a group norm."""
    return nn.BatchNorm2d(channels) if norm == "bn" else group_norm(channels)


class FusionWeights(nn.Module):
    """Add maps of one shape, each with a learned share (EfficientDet, Sec. 3.3).

    Args:
        inputs: how many maps.
        kind: "fast": the weights, cut off at 0, over their sum; or "softmax".
    """

    def __init__(self, inputs: int, kind: str = "fast") -> None:
        super().__init__()
        self.weight, self.kind = nn.Parameter(torch.ones(inputs)), kind

    @property
    def shares(self) -> Tensor:
        """Return the share of each input: (inputs,)."""
        if self.kind == "softmax":
            return self.weight.softmax(0)
        positive = self.weight.relu()
        return positive / (positive.sum() + 1e-4)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        first, *others = (share * x for share, x in zip(self.shares, maps, strict=True))
        return sum(others, first)


def upsample(x: Tensor, size: Sequence[int]) -> Tensor:
    """Repeat the nearest pixel up to a finer level's `size` (Hi, Wi)."""
    return F.interpolate(x, size=tuple(size), mode="nearest")


def downsample(x: Tensor, steps: int = 1) -> Tensor:
    """Max-pool by 2^`steps`: windows of the stride's size, the last ones cut off at the border."""
    return F.max_pool2d(x, 2**steps, ceil_mode=True)


def resample(x: Tensor, steps: int, size: Sequence[int]) -> Tensor:
    """Bring a map to the `size` of a level that is `steps` coarser; negative: finer."""
    return downsample(x, steps) if steps > 0 else upsample(x, size) if steps < 0 else x


class InputLevels(nn.Module):
    """1x1 convolutions bring the backbone's maps to one width; coarser levels are max-pooled from the one before."""

    def __init__(self, in_levels: Sequence[Level], names: Sequence[str], channels: int, norm: Norm) -> None:
        super().__init__()
        widths = {level.name.replace("c", "p"): level.channels for level in in_levels}
        self.lateral = nn.ModuleDict({n: convolution(widths[n], channels, 1, norm) for n in names if n in widths})
        self.pooled = [n for n in names if n not in widths]
        self.levels = tuple(Level(n, channels) for n in names)

    def forward(self, features: Features) -> Features:
        """Return the levels (N, d, Hi, Wi), finest first."""
        maps = {n: lateral(features[n.replace("p", "c")]) for n, lateral in self.lateral.items()}
        coarsest = list(maps)[-1]
        for n in self.pooled:
            maps[n] = downsample(maps[coarsest])
            coarsest = n
        return maps

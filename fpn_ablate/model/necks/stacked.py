"""Pyramids that go over their levels several times: the baselines of EfficientDet's Table 5 (Tan et al. 2020).

Shape letters: N images, d channels, Hi x Wi cells of level i.
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from fpn_ablate.config.necks import StackedNeck
from fpn_ablate.model.necks.base import Neck
from fpn_ablate.model.necks.layers import (
    ACTIVATIONS,
    InputLevels,
    convolution,
    downsample,
    resample,
    separable_convolution,
    upsample,
)
from fpn_ablate.structures.levels import Features, Level


class Stacked(Neck):
    """Repeated FPN, repeated FPN + PANet, or a fully connected FPN.

    Args:
        in_levels: C2..C5, finest first.
        config: its switches.
            channels: d.
            levels: "p3-p7" or "p2-p6"; those beyond C5 are max-pooled.
            layers: how often the block is repeated.
            block: "fpn" (a top-down path), "fpn_pan" (top-down, then bottom-up), or "full" (each level from all levels;
                EfficientDet names it and no definition is public: here the sum of all levels, resampled, and a convolution).
            separable: 3x3 of each channel by itself and 1x1 (EfficientDet's comparison), or plain 3x3 convolutions.
            act: in front of each convolution of a block, as in BiFPN; without one, a stack is linear but for its norms.
            norm: behind each convolution.
    """

    has_lateral = has_top_down = True

    def __init__(self, in_levels: Sequence[Level], config: StackedNeck) -> None:
        super().__init__()
        self.inputs = InputLevels(in_levels, config.level_names, config.channels, config.norm)
        self.levels = self.inputs.levels
        names = [level.name for level in self.levels]
        blocks = {"fpn": [TopDown], "fpn_pan": [TopDown, BottomUp], "full": [Full]}[config.block]
        self.blocks = nn.ModuleList(block(names, config) for _ in range(config.layers) for block in blocks)

    def forward(self, features: Features) -> Features:
        """Return the levels (N, d, Hi, Wi), finest first."""
        maps = self.inputs(features)
        for block in self.blocks:
            maps = block(maps)
        return maps


class Block(nn.Module):
    """An activation and a 3x3 convolution for each level."""

    def __init__(self, names: Sequence[str], config: StackedNeck) -> None:
        super().__init__()
        channels, norm = config.channels, config.norm
        self.act = ACTIVATIONS[config.act]()
        self.convs = nn.ModuleDict(
            {
                n: separable_convolution(channels, norm) if config.separable else convolution(channels, channels, 3, norm)
                for n in names
            }
        )

    def convolve(self, name: str, x: Tensor) -> Tensor:
        """Return the level `name` of summed maps (N, d, Hi, Wi)."""
        return self.convs[name](self.act(x))


class TopDown(Block):
    """Add the upsampled coarser output to each level, then convolve."""

    def forward(self, maps: Features) -> Features:
        names = list(maps)
        out = {names[-1]: self.convolve(names[-1], maps[names[-1]])}
        for fine, coarse in reversed(list(pairwise(names))):
            out[fine] = self.convolve(fine, maps[fine] + upsample(out[coarse], maps[fine].shape[-2:]))
        return {n: out[n] for n in names}


class BottomUp(Block):
    """Add the max-pooled finer output to each level, then convolve."""

    def forward(self, maps: Features) -> Features:
        names = list(maps)
        out = {names[0]: self.convolve(names[0], maps[names[0]])}
        for fine, coarse in pairwise(names):
            out[coarse] = self.convolve(coarse, maps[coarse] + downsample(out[fine]))
        return out


class Full(Block):
    """Add all levels, resampled, at each level, then convolve."""

    def forward(self, maps: Features) -> Features:
        order = {name: k for k, name in enumerate(maps)}
        sizes = {name: x.shape[-2:] for name, x in maps.items()}
        return {
            name: self.convolve(name, sum(resample(x, order[name] - order[other], sizes[name]) for other, x in maps.items()))
            for name in maps
        }

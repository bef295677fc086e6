"""Neck that reads the hierarchy of a network as it is: Fig. 1 (c), as SSD does (Liu et al., ECCV 2016).

Shape letters: N images of H x W pixels, Hi x Wi = ceil(H / 2^i) x ceil(W / 2^i) cells of C_i.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fpn_ablate.config.parts import HierarchyNeck
from fpn_ablate.model.layers import L2Norm
from fpn_ablate.model.necks.base import Neck
from fpn_ablate.structures.levels import Features, Level


class ExtraLayer(nn.Module):
    """A 1x1 convolution to half the width and a 3x3 of stride 2, each with ReLU: SSD's conv8_1 and conv8_2."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(in_channels, channels // 2, 1)
        self.conv = nn.Conv2d(channels // 2, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(F.relu(self.reduce(x))))


class Hierarchy(Neck):
    """Return the backbone's maps from one on, each of its own width, and further ones of stride-2 layers behind C5.

    Args:
        in_levels: C2..C5, finest first.
        config: its switches.
            start: the finest map that is read.
            extras: the number of stride-2 layers: C6, C7, ...
            extra_channels: their width.
            l2_norm: L2 normalisation of the finest map.
    """

    def __init__(self, in_levels: Sequence[Level], config: HierarchyNeck) -> None:
        super().__init__()
        read = [spec for spec in in_levels if spec.name >= config.start]
        extras = [Level(f"c{6 + number}", config.extra_channels) for number in range(config.extras)]
        self.levels = (*read, *extras)
        self.deepest = read[-1].name
        self.l2_norm = nn.ModuleDict({read[0].name: L2Norm(read[0].channels)} if config.l2_norm else {})
        before = (read[-1], *extras)
        self.extra = nn.ModuleDict(
            {spec.name: ExtraLayer(last.channels, spec.channels) for last, spec in zip(before, extras, strict=False)}
        )

    def forward(self, features: Features) -> Features:
        """Return the levels (N, channels, Hi, Wi), finest first."""
        out = {spec.name: features[spec.name] for spec in self.levels if spec.name in features}
        x = out[self.deepest]
        for name, layer in self.extra.items():
            out[name] = x = layer(x)
        return out | {name: norm(out[name]) for name, norm in self.l2_norm.items()}

"""Layers that several parts share."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpn_ablate.model.precision import full_precision

GROUP = 8  # channels of group norm, as 32 groups of 256; fewer where they do not divide the width


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(channels // math.gcd(GROUP, channels), channels)


class L2Norm(nn.Module):
    """Scale the features of each cell to length 1, then each channel by a learned factor (ParseNet; SSD's conv4_3).

    Maps of different depth differ in scale, and the finest would be drowned.
    """

    START = 20.0

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((channels,), self.START))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(full_precision(x)) * self.factor[:, None, None]

    def init_parameter(self, layer: nn.Module, parameter: Tensor, generator: torch.Generator) -> bool:
        """Start at 20 (SSD)."""
        nn.init.constant_(parameter, self.START)
        return True

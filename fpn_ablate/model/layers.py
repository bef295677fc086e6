"""Layers that several parts share."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class L2Norm(nn.Module):
    """Normalise each cell's features (N, C, H, W) to length 1, and scale each channel by a learned factor (SSD, Sec. 3.1).

    Args:
        scale: that every factor starts from.
    """

    def __init__(self, channels: int, scale: float = 20.0) -> None:
        super().__init__()
        self.scale, self.start = nn.Parameter(torch.full((channels,), scale)), scale

    def init_parameter(self, layer: nn.Module, parameter: Tensor, generator: torch.Generator) -> bool:
        """Set the factors to their start."""
        nn.init.constant_(parameter, self.start)
        return True

    def forward(self, x: Tensor) -> Tensor:
        return self.scale[:, None, None] * F.normalize(x, dim=1)

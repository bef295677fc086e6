"""Heads of the mask branch (He et al. 2017, Fig. 4 and Table 2 e).

Shape letters: M RoIs, C channels, B x B bins of a RoI's features, K classes (1 if masks are class-agnostic), R x R pixels of a
mask, R = 2 B.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpn_ablate.config.parts import MaskConfig


class FCN(nn.Module):
    """3x3 convolutions, a deconvolution that doubles the resolution, and a 1x1 convolution.

    A head of another kind has the same constructor, `label` and output, and its last layer is `logits` too.
    """

    label = "fcn"

    def __init__(self, config: MaskConfig, in_channels: int, resolution: int, num_classes: int) -> None:
        super().__init__()
        widths = [in_channels, *[config.channels] * config.convolutions]
        self.convs = nn.ModuleList(nn.Conv2d(*pair, 3, padding=1) for pair in pairwise(widths))
        self.deconv = nn.ConvTranspose2d(widths[-1], config.channels, 2, stride=2)
        self.logits = nn.Conv2d(config.channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map features (M, C, B, B) to the logits of each class's mask (M, K, R, R)."""
        for conv in self.convs:
            x = F.relu(conv(x))
        return self.logits(F.relu(self.deconv(x)))

    def init_parameter(self, layer: nn.Module, parameter: Tensor, generator: torch.Generator) -> bool:
        """Draw weights as He et al. 2015 by fan-out (detectron2); `MaskBranch` draws those of `logits`."""
        if is_weight := parameter.dim() > 1 and layer is not self.logits:
            nn.init.kaiming_normal_(parameter, mode="fan_out", generator=generator)
        return is_weight


class MLP(nn.Module):
    """Three fully connected layers (Table 2 e); the first two start as those of the box head."""

    label = "mlp"

    def __init__(self, config: MaskConfig, in_channels: int, resolution: int, num_classes: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_channels * resolution**2, config.fc_dim)
        self.fc2 = nn.Linear(config.fc_dim, config.fc_dim)
        self.logits = nn.Linear(config.fc_dim, num_classes * (2 * resolution) ** 2)
        self.shape = num_classes, 2 * resolution, 2 * resolution

    def forward(self, x: Tensor) -> Tensor:
        """Map features (M, C, B, B) to the logits of each class's mask (M, K, R, R)."""
        return self.logits(F.relu(self.fc2(F.relu(self.fc1(x.flatten(1)))))).unflatten(1, self.shape)

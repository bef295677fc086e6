"""Box heads of the second stage, and the predictor behind them.

Shape letters: M RoIs, C channels, S x S bins, K classes.
"""

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpn_ablate.config.parts import RoI
from fpn_ablate.model.precision import autocast_off, full_precision

# The backbone's stage C5, None if the neck reads it, and its width.
Conv5Stage = tuple[nn.Module | None, int]


class BoxHead(nn.Module):
    """Base of box heads: `forward` maps pooled features (M, C, S, S) to (M, out_channels).

    Attributes:
        backbone_stage: name of the backbone's stage that it holds as `stage`, whose weights it starts from; None: none.
        label: its name in tables.
    """

    out_channels: int
    backbone_stage: str | None = None

    @property
    def label(self) -> str:
        return type(self).__name__

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def mask_features(self, x: Tensor) -> Tensor:
        """Return the maps of pooled features (M, C, S, S) that a mask branch can share."""
        return x

    def from_mask_features(self, maps: Tensor) -> Tensor:
        """Map `mask_features` to (M, out_channels): the rest of `forward`."""
        return self(maps)


class TwoFC(BoxHead):
    """Two fully connected layers with ReLU on the pooled features, shared over all levels.

    Args:
        views: pooled features of each RoI, one a level with adaptive feature pooling; the maximum of what the first layer makes
            of them goes on (PANet, Sec. 3.2).
    """

    label = "2fc"

    def __init__(self, in_channels: int, resolution: int, fc_dim: int, views: int = 1) -> None:
        super().__init__()
        self.views = views
        self.out_channels = fc_dim
        self.fc6 = nn.Linear(in_channels * resolution**2, fc_dim)
        self.fc7 = nn.Linear(fc_dim, fc_dim)

    @classmethod
    def from_config(cls, config: RoI, in_channels: int, resolution: int, conv5: Conv5Stage, views: int) -> Self:
        """Construct the head for pooled features of C = in_channels and S = resolution."""
        return cls(in_channels, resolution, config.fc_dim, views)

    def forward(self, x: Tensor) -> Tensor:
        """Map pooled features (M, C, S, S), or (views * M, C, S, S), to (M, fc_dim)."""
        return F.relu(self.fc7(self.merge(F.relu(self.fc6(x.flatten(1))))))

    def merge(self, hidden: Tensor) -> Tensor:
        """Return the maximum (M, fc_dim) over the views of each RoI."""
        return hidden.unflatten(0, (self.views, -1)).amax(0) if self.views > 1 else hidden


class Conv5(BoxHead):
    """Run all layers of conv5 on the pooled C4, then average: the head of baseline (a), as in He et al."""

    label = "conv5"
    backbone_stage = "c5"

    def __init__(self, stage: nn.Module, out_channels: int) -> None:
        super().__init__()
        self.stage, self.out_channels = stage, out_channels

    @classmethod
    def from_config(cls, config: RoI, in_channels: int, resolution: int, conv5: Conv5Stage, views: int) -> Self:
        """Construct the head from the stage alone."""
        return cls(*conv5)

    def forward(self, x: Tensor) -> Tensor:
        """Map pooled features (M, C, S, S) to (M, out_channels)."""
        return self.from_mask_features(self.mask_features(x))

    def mask_features(self, x: Tensor) -> Tensor:
        """Return the stage's maps (M, out_channels, S / 2, S / 2)."""
        return self.stage(x)

    def from_mask_features(self, maps: Tensor) -> Tensor:
        """Average the stage's maps."""
        return maps.mean((2, 3))

    def init_parameter(self, layer: nn.Module, parameter: Tensor, generator: torch.Generator) -> bool:
        """Draw the weights of convolutions as He et al., as in a backbone."""
        if is_convolution := parameter.dim() > 1 and isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(parameter, mode="fan_out", generator=generator)
        return is_convolution


class Predictor(nn.Module):
    """Predict scores of background and K classes, and class-specific box deltas."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.scores = nn.Linear(in_channels, num_classes + 1)
        self.deltas = nn.Linear(in_channels, num_classes * 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (M, C) to scores (M, K + 1) and deltas (M, K, 4), in fp32: a bf16 score has 8 bits, and many RoIs would tie."""
        with autocast_off():
            x = full_precision(x)
            return self.scores(x), self.deltas(x).unflatten(1, (-1, 4))  # `view` cannot infer a size where M is 0

    def init_parameter(self, layer: nn.Module, parameter: Tensor, generator: torch.Generator) -> bool:
        """Draw Gaussian weights: 0.01 for scores, 0.001 for deltas (Detectron)."""
        if is_weight := parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.001 if layer is self.deltas else 0.01, generator=generator)
        return is_weight

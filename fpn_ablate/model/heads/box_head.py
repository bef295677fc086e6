"""Box heads of the second stage, and the predictor behind them.

Shape letters: M RoIs, C channels, S x S bins, K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpn_ablate.model.ops.onednn import Linear, linear


class FlattenLinear(Linear):
    """Fully connected layer on maps (M, C, S, S), with its weights in the order of these dimensions."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_contiguous():
            return super().forward(x.flatten(1))
        # Channels last, as `roi_align` returns. Reorder the weights, which are fewer, and not the maps.
        weight = self.weight.unflatten(1, x.shape[1:]).permute(0, 2, 3, 1).flatten(1)
        return linear(x.permute(0, 2, 3, 1).flatten(1), weight, self.bias)


class TwoFC(nn.Module):
    """Two fully connected layers with ReLU on the pooled features, shared over all levels."""

    def __init__(self, in_channels: int, resolution: int, fc_dim: int) -> None:
        super().__init__()
        self.out_channels = fc_dim
        self.fc6 = FlattenLinear(in_channels * resolution**2, fc_dim)
        self.fc7 = Linear(fc_dim, fc_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map pooled features (M, C, S, S) to (M, fc_dim)."""
        return F.relu(self.fc7(F.relu(self.fc6(x))))


class Conv5(nn.Module):
    """Run all layers of conv5 on the pooled C4, then average: the head of baseline (a), as in He et al."""

    def __init__(self, stage: nn.Module, out_channels: int) -> None:
        super().__init__()
        self.stage, self.out_channels = stage, out_channels

    def forward(self, x: Tensor) -> Tensor:
        """Map pooled features (M, C, S, S) to (M, out_channels)."""
        return self.stage(x).mean((2, 3))


class Predictor(nn.Module):
    """Predict scores of background and K classes, and class-specific box deltas."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.scores = Linear(in_channels, num_classes + 1)
        self.deltas = Linear(in_channels, num_classes * 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (M, C) to scores (M, K + 1) and deltas (M, K, 4), in fp32: a bf16 score has 8 bits, and many RoIs would tie."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            return self.scores(x), self.deltas(x).unflatten(1, (-1, 4))  # `view` cannot infer a size where M is 0

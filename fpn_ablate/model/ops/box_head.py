"""Box head of two fully connected layers that reads pooled features in channels_last as they are."""

import torch.nn.functional as F
from torch import Tensor

from fpn_ablate.model.heads.box_head import TwoFC
from fpn_ablate.model.ops.onednn import linear


class FastTwoFC(TwoFC):
    """`TwoFC` whose products run in oneDNN."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(_flat_linear(x, self.fc6.weight, self.fc6.bias))
        return F.relu(linear(self.merge(hidden), self.fc7.weight, self.fc7.bias))


def _flat_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute F.linear of flattened maps (M, C, S, S); the columns of `weight` are in the order of (C, S, S)."""
    if x.is_contiguous():
        return linear(x.flatten(1), weight, bias)
    # Channels last, as `roi_align` returns. Reorder the weights, which are fewer, and not the maps.
    weight = weight.unflatten(1, x.shape[1:]).permute(0, 2, 3, 1).flatten(1)
    return linear(x.permute(0, 2, 3, 1).flatten(1), weight, bias)

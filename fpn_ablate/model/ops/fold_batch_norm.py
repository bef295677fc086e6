"""Fold frozen batch norms into the convolutions in front of them: one pass over each map less."""

from itertools import pairwise

from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from fpn_ablate.model.ops.onednn import Conv2d


class FoldedConv2d(Conv2d):
    """A convolution that applies the frozen batch norm behind it in its own weights and bias."""

    def forward(self, x: Tensor) -> Tensor:
        (norm,) = self._norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        bias = norm.bias - norm.running_mean * scale
        if self.bias is not None:
            bias = bias + self.bias * scale
        return self._conv_forward(x, self.weight * scale[:, None, None, None], bias)


class FoldedBatchNorm2d(FrozenBatchNorm2d):
    """Identity; its statistics are applied by the preceding `FoldedConv2d`."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def fold_batch_norm(module: nn.Module) -> nn.Module:
    """Make each convolution apply the frozen batch norm right behind it.

    Works where blocks list their layers in the order in which they run, as torchvision's and ours do. Names, weights and
    gradients stay.
    """
    for parent in module.modules():
        children = list(parent.children())
        for conv, norm in pairwise(children):
            if type(conv) in (nn.Conv2d, Conv2d) and type(norm) is FrozenBatchNorm2d:
                conv.__class__, norm.__class__ = FoldedConv2d, FoldedBatchNorm2d
                conv._norm = (norm,)  # in a tuple, so that it is not registered as a module of the convolution
    return module


def unfold_batch_norm(module: nn.Module) -> nn.Module:
    """Undo `fold_batch_norm`."""
    for m in module.modules():
        if isinstance(m, FoldedConv2d):
            m.__class__ = nn.Conv2d
        elif isinstance(m, FoldedBatchNorm2d):
            m.__class__ = FrozenBatchNorm2d
    return module

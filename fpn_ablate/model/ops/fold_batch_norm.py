"""Fold frozen batch norms into the convolutions in front of them: one pass over each map less."""

from itertools import pairwise

from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from fpn_ablate.model.ops.onednn import Conv2d
from fpn_ablate.model.ops.replace import variant


class FoldedConv2d(Conv2d):
    """A convolution that applies the frozen batch norm behind it in its own weights and bias."""

    _norm: tuple[FrozenBatchNorm2d]  # in a tuple, so that it is not registered as a module of the convolution

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

    Works where blocks list their layers in the order in which they run. Names, weights and gradients stay.
    """
    for parent in list(module.modules()):
        for (name, conv), (norm_name, norm) in pairwise(list(parent.named_children())):
            if type(conv) is nn.Conv2d and type(norm) is FrozenBatchNorm2d:
                folded = variant(conv, FoldedConv2d)
                folded._norm = (variant(norm, FoldedBatchNorm2d),)
                parent.set_submodule(name, folded)
                parent.set_submodule(norm_name, folded._norm[0])
    return module

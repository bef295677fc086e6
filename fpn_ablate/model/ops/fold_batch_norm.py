"""Fold frozen batch norms into the convolutions in front of them."""

from itertools import pairwise

from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from fpn_ablate.model.ops.onednn import Conv2d


class FoldedConv2d(Conv2d):
    """A convolution that works out the frozen batch norm behind it as well, in its weights."""

    def forward(self, x: Tensor) -> Tensor:
        (norm,) = self._norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        bias = norm.bias - norm.running_mean * scale
        if self.bias is not None:
            bias = bias + self.bias * scale
        return self._conv_forward(x, self.weight * scale[:, None, None, None], bias)


class FoldedBatchNorm2d(FrozenBatchNorm2d):
    """What is left of a frozen batch norm in front of which a `FoldedConv2d` stands: its numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def fold_batch_norm(module: nn.Module) -> nn.Module:
    """Let each convolution work out the frozen batch norm that comes right behind it, for as many passes over its output less.

    For networks whose blocks name their layers in the order in which they run, which torchvision's and ours do. Names, weights
    and gradients stay.
    """
    for parent in module.modules():
        children = list(parent.children())
        for conv, norm in pairwise(children):
            if type(conv) in (nn.Conv2d, Conv2d) and type(norm) is FrozenBatchNorm2d:
                conv.__class__, norm.__class__ = FoldedConv2d, FoldedBatchNorm2d
                conv._norm = (norm,)  # in a tuple, so that it is no module of the convolution's as well
    return module


def unfold_batch_norm(module: nn.Module) -> nn.Module:
    """The inverse of `fold_batch_norm`."""
    for m in module.modules():
        if isinstance(m, FoldedConv2d):
            m.__class__ = nn.Conv2d
        elif isinstance(m, FoldedBatchNorm2d):
            m.__class__ = FrozenBatchNorm2d
    return module

"""Replace modules by faster ones that compute the same."""

from torch import nn

from fpn_ablate.model.ops.onednn import Conv2d


def optimise(module: nn.Module) -> nn.Module:
    """Make every `nn.Conv2d` in it a `Conv2d`."""
    for m in module.modules():
        if type(m) is nn.Conv2d:
            m.__class__ = Conv2d
    return module

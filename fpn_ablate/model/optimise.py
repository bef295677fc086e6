"""Replace modules of a built detector by faster ones that compute the same; what they are lies in ops/.

The oneDNN layers of the second stage's box head and the sparse RoIAlign are no replacements: they are built in.
"""

from torch import nn

from fpn_ablate.model.ops.fold_batch_norm import fold_batch_norm
from fpn_ablate.model.ops.onednn import Conv2d


def optimise(model: nn.Module, fold: bool = False) -> nn.Module:
    """Give every `nn.Conv2d` the products of oneDNN; with `fold`, fold frozen batch norms into the convolutions before them.

    Names, weights and state dicts stay.
    """
    if fold:
        fold_batch_norm(model)
    for module in model.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = Conv2d
    return model

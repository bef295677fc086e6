"""Replace modules of a built detector by the faster ones of ops/, which compute the same.

Heads and pooler also call ops/ directly: `Linear`, `conv3x3_at` and `roi_align` are not put in here.
"""

from torch import nn

from fpn_ablate.model.ops.fold_batch_norm import fold_batch_norm
from fpn_ablate.model.ops.onednn import Conv2d


def optimise(model: nn.Module, fold: bool = False) -> nn.Module:
    """Make every `nn.Conv2d` a `Conv2d` of oneDNN; with `fold`, fold frozen batch norms into the convolutions before them.

    Names, weights and state dicts stay.
    """
    if fold:
        fold_batch_norm(model)
    for module in model.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = Conv2d
    return model

"""Interface of a neck: from the backbone's maps to the levels that the heads read."""

from collections.abc import Sequence

from torch import nn

from fpn_ablate.model.necks.layers import FusionWeights
from fpn_ablate.structures.levels import Features, Level


class Neck(nn.Module):
    """Base of necks. A neck sets `levels` and defines `forward`; the rest has defaults.

    Its constructor gets the backbone's levels C2..C5, finest first, and its configuration.

    Attributes:
        levels: what `forward` returns, finest first, all of one width unless each has a head of its own.
        deepest: the last backbone map that it reads; later stages are not built.
        has_lateral, has_top_down: marks in the tables' columns "lateral?" and "top-down?".
        final_convs: names of 3x3 convolutions whose output the neck returns as it is. A faster variant of them computes only
            the cells that are read.
    """

    levels: tuple[Level, ...]
    deepest: str = "c5"
    has_lateral: bool = False
    has_top_down: bool = False
    final_convs: Sequence[str] = ()

    @property
    def label(self) -> str:
        """Return the maps that the heads read, in the paper's words: {Pk}, P2, C4."""
        names = [level.name.upper() for level in self.levels]
        return names[0] if len(names) == 1 else f"{{{names[0][0]}k}}"

    @property
    def fusion_shares(self) -> dict[str, list[float]]:
        """Return the learned share of each input of each weighted sum, by the sum's place in the neck; {} without any."""
        sums = ((name, module) for name, module in self.named_modules() if isinstance(module, FusionWeights))
        return {name.removesuffix(".fusion"): module.shares.tolist() for name, module in sums}

    def forward(self, features: Features) -> Features:
        """Map C2..`deepest` to `levels`, maps of ceil(side / stride)."""
        raise NotImplementedError

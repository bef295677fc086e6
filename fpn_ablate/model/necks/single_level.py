"""Neck that passes on one backbone map as it is: the baselines of Table 1, rows (a) C4 and (b) C5."""

from collections.abc import Sequence

from torch import nn

from fpn_ablate.structures.levels import Features, Level


class SingleLevel(nn.Module):
    """Return the backbone map `level`, "c2" to "c5", and read none deeper."""

    def __init__(self, in_levels: Sequence[Level], level: str) -> None:
        super().__init__()
        self.levels = tuple(spec for spec in in_levels if spec.name == level)
        self.deepest = level

    def forward(self, features: Features) -> Features:
        return {spec.name: features[spec.name] for spec in self.levels}

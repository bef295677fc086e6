"""Neck that passes on one backbone map as it is: the baselines of Table 1, rows (a) C4 and (b) C5."""

from collections.abc import Sequence

from fpn_ablate.config.parts import SingleLevelNeck
from fpn_ablate.model.necks.base import Neck
from fpn_ablate.structures.levels import Features, Level


class SingleLevel(Neck):
    """Return the backbone map `config.level`, "c2" to "c5", and read none deeper."""

    def __init__(self, in_levels: Sequence[Level], config: SingleLevelNeck) -> None:
        super().__init__()
        self.levels = tuple(spec for spec in in_levels if spec.name == config.level)
        self.deepest = config.level

    def forward(self, features: Features) -> Features:
        return {spec.name: features[spec.name] for spec in self.levels}

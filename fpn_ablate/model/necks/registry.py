"""List the necks by their `name` in the configuration.

A neck is a module with `levels` (what it returns, finest first), `deepest` (the last backbone map that it reads: later stages
are not built) and `forward(features) -> features`. It is constructed from the levels C2..C5, finest first, and from the
configuration's other keys by name.
"""

from collections.abc import Callable

from torch import nn

from fpn_ablate.model.necks.fpn import FPN
from fpn_ablate.model.necks.single_level import SingleLevel

NECKS: dict[str, Callable[..., nn.Module]] = {"fpn": FPN, "single_level": SingleLevel}

"""Feature levels: the only place that says what one is. Anchors, RPN and RoI pooling derive from it and repeat none of it.

Shape letters: N images of H x W pixels.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fpn_ablate.utils.errors import UserError


@dataclass(frozen=True)
class Level:
    """A feature map of one scale. Its name gives its stride 2^k: `p3` has stride 8.

    Raises:
        ValueError: the name is not a letter and a number.
    """

    name: str
    channels: int

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z]\d", self.name):
            raise ValueError(f"level {self.name!r}: call it a letter and k, after its stride 2^k, as p3")

    @property
    def stride(self) -> int:
        return 2 ** int(self.name[1:])


Features = dict[str, Tensor]  # level name -> (N, channels, ceil(H / stride), ceil(W / stride)), finest first


def common_width(levels: Sequence[Level], reader: str) -> int:
    """Return the number of channels of all levels, for a `reader` that has one set of weights for them.

    Raises:
        UserError: they differ.
    """
    if len({level.channels for level in levels}) > 1:
        widths = ", ".join(f"{level.name} ({level.channels} channels)" for level in levels)
        raise UserError(f"{reader} needs levels of one width, and the neck's are {widths}")
    return levels[0].channels

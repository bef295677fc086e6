"""The one source for what a feature level is. Anchors, RPN and RoI pooling derive from it and write none of it again."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Level:
    """A feature map of one scale. Its stride is 2^k for the k of its name: `p3` has stride 8."""

    name: str
    channels: int

    @property
    def stride(self) -> int:
        return 2 ** int(self.name[1:])


Features = dict[str, Tensor]  # level name -> (N, channels, ceil(H / stride), ceil(W / stride)), finest first

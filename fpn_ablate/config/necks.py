"""Declare the configurations of the necks that came after FPN and share no code with it; FPN's own is in `parts`."""

from typing import Annotated, Literal

from pydantic import Field

from fpn_ablate.config.base import Strict

Layers = Annotated[int, Field(strict=True, ge=1, le=16)]
Channels = Annotated[int, Field(strict=True, ge=1, le=4096)]
Norm = Literal["none", "gn", "bn"]
Activation = Literal["none", "relu", "swish"]


class _NeckKeys(Strict):
    """`norm` follows each convolution of the neck: none, group norm, or batch norm with trained statistics."""

    channels: Channels
    levels: Literal["p2-p6", "p3-p7"]
    norm: Norm

    @property
    def level_names(self) -> tuple[str, ...]:
        """Return the names of the levels that the neck puts out, finest first."""
        first, last = (int(name[1:]) for name in self.levels.split("-"))
        return tuple(f"p{k}" for k in range(first, last + 1))

    @property
    def row(self) -> str:
        """Return the name of the row that differs from the default by this neck alone."""
        return self.name  # type: ignore[attr-defined]


class BiFPNNeck(_NeckKeys):
    """See `fpn_ablate.model.necks.bifpn.BiFPN`."""

    name: Literal["bifpn"]
    layers: Layers
    fusion: Literal["fast", "softmax", "sum"]
    separable: bool
    bottom_up: bool
    act: Activation


class NASFPNNeck(_NeckKeys):
    """See `fpn_ablate.model.necks.nas_fpn.NASFPN`."""

    name: Literal["nas_fpn"]
    stacks: Layers
    attention: Literal["coarse_max", "fine_mean"]


class YOLONeck(_NeckKeys):
    """See `fpn_ablate.model.necks.yolo.YOLO`."""

    name: Literal["yolo"]
    fuse: Literal["concat", "sum"]


class StackedNeck(_NeckKeys):
    """See `fpn_ablate.model.necks.stacked.Stacked`."""

    name: Literal["stacked"]
    layers: Layers
    block: Literal["fpn", "fpn_pan", "full"]
    separable: bool
    act: Activation = "none"  # configurations of earlier runs lack it

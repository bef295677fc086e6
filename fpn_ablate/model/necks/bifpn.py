"""BiFPN: weighted fusion down and up the pyramid (Tan et al., EfficientDet, CVPR 2020, arXiv:1911.09070, Sec. 3).

Shape letters: N images, d channels, Hi x Wi cells of level i.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from fpn_ablate.config.necks import BiFPNNeck
from fpn_ablate.model.necks.base import Neck
from fpn_ablate.model.necks.layers import ACTIVATIONS, FusionWeights, convolution, separable_convolution, upsample
from fpn_ablate.structures.levels import Features, Level


def pool(x: Tensor) -> Tensor:
    """Halve a map by a 3x3 maximum."""
    return F.max_pool2d(x, 3, 2, 1)


class BiFPN(Neck):
    """Bidirectional pyramid: top-down and bottom-up paths, with an edge from the input to the output of middle levels.

    Args:
        in_levels: C2..C5, finest first.
        config: its switches.
            channels: d (64 to 384).
            levels: "p3-p7" (the paper's) or "p2-p6".
            layers: how often both ways are gone (3 to 8).
            fusion: of a node's inputs, each with a learned weight: "fast" (the weights, cut off at 0, over their sum) or
                "softmax"; or the plain "sum" (no weights).
            separable: 3x3 of each channel by itself and 1x1, or plain 3x3 convolutions.
            bottom_up: have the bottom-up path as well; off: the top-down path alone.
            act: in front of a node's convolution (the authors' code; the paper has norm and activation behind it).
            norm: behind each convolution; batch norm in the paper.
    """

    has_lateral = has_top_down = True

    def __init__(self, in_levels: Sequence[Level], config: BiFPNNeck) -> None:
        super().__init__()
        names = list(config.level_names)
        widths = {level.name.replace("c", "p"): level.channels for level in in_levels}
        self.read = {n: n.replace("p", "c") for n in names if n in widths}
        self.pooled = [n for n in names if n not in widths]
        self.first_pooled = nn.ModuleDict(
            {n: convolution(in_levels[-1].channels, config.channels, 1, config.norm) for n in self.pooled[:1]}
        )
        # In the first layer every edge from a map of the backbone has a projection of its own.
        self.layers = nn.ModuleList(
            Layer(names, config, {n: widths[n] for n in self.read} if number == 0 else {}) for number in range(config.layers)
        )
        self.levels = tuple(Level(n, config.channels) for n in names)

    def forward(self, features: Features) -> Features:
        """Return the levels (N, d, Hi, Wi), finest first."""
        maps = {n: features[c] for n, c in self.read.items()}
        for n in self.pooled:
            maps[n] = pool(self.first_pooled[n](features["c5"]) if n in self.first_pooled else maps[f"p{int(n[1:]) - 1}"])
        for layer in self.layers:
            maps = layer(maps)
        return maps


class Layer(nn.Module):
    """One top-down and one bottom-up path.

    Args:
        names: of the levels, finest first.
        widths: channels of levels that come from the backbone and are not d wide yet.
    """

    def __init__(self, names: Sequence[str], config: BiFPNNeck, widths: dict[str, int]) -> None:
        super().__init__()
        self.names = list(names)

        def node(name: str, inputs: int) -> Node:
            return Node(inputs, config, widths.get(name))

        *finer, coarsest = names
        self.down = nn.ModuleDict({n: node(n, 2) for n in finer})
        middle = [n for n in names[1:-1] if config.bottom_up]
        self.up = nn.ModuleDict({n: node(n, 3) for n in middle})
        self.up[coarsest] = node(coarsest, 2 if config.bottom_up else 1)
        self.bottom_up = config.bottom_up

    def forward(self, maps: Features) -> Features:
        """Map the levels to new ones, all (N, d, Hi, Wi), finest first."""
        inner = {self.names[-1]: maps[self.names[-1]]}
        for fine, coarse in reversed(list(pairwise(self.names))):
            inner[fine] = self.down[fine](maps[fine], upsample(inner[coarse], maps[fine].shape[-2:]))
        out = {self.names[0]: inner[self.names[0]]}
        for fine, coarse in pairwise(self.names):
            below = [pool(out[fine])] if self.bottom_up else []
            if coarse == self.names[-1]:
                out[coarse] = self.up[coarse](maps[coarse], *below)
            else:
                out[coarse] = self.up[coarse](maps[coarse], inner[coarse], *below) if self.bottom_up else inner[coarse]
        return out


class Node(nn.Module):
    """Fuse maps of one level: weighted sum, activation, convolution.

    Args:
        inputs: how many maps.
        width: channels of the first map if it is a backbone's, which a 1x1 convolution brings to d.
    """

    def __init__(self, inputs: int, config: BiFPNNeck, width: int | None) -> None:
        super().__init__()
        channels, norm = config.channels, config.norm
        self.project = convolution(width, channels, 1, norm) if width else nn.Identity()
        self.fusion = FusionWeights(inputs, config.fusion) if inputs > 1 and config.fusion != "sum" else None
        self.act = ACTIVATIONS[config.act]()
        self.conv = separable_convolution(channels, norm) if config.separable else convolution(channels, channels, 3, norm)

    def forward(self, first: Tensor, *others: Tensor) -> Tensor:
        first = self.project(first)
        return self.conv(self.act(self.fusion([first, *others]) if self.fusion else sum(others, first)))

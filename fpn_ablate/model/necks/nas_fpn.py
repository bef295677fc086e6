"""NAS-FPN: seven merging cells that a search found (Ghiasi et al., CVPR 2019, arXiv:1904.07392, Fig. 6).

Shape letters: N images, d channels, Hi x Wi cells of level i.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fpn_ablate.config.necks import NASFPNNeck, Norm
from fpn_ablate.model.necks.base import Neck
from fpn_ablate.model.necks.layers import InputLevels, convolution, resample
from fpn_ablate.structures.levels import Features, Level

# (level, operation, two inputs) in the order of computation; levels 0 (finest) to 4, nodes 0 to 4 the inputs, then the cells.
CELLS = (
    (1, "attention", 3, 1),
    (1, "sum", 5, 1),
    (0, "sum", 6, 0),  # out
    (1, "sum", 7, 6),  # out
    (2, "attention", 8, 7),  # out
    (4, "attention", 9, 6),  # out
    (3, "attention", 10, 9),  # out
)
UNUSED = {9: 2, 10: 4}  # inputs that no cell reads are added to the output of their level
OUT = (7, 8, 9, 11, 10)  # nodes of the five levels


class NASFPN(Neck):
    """Stacks of the seven cells on 1x1 convolutions of the backbone's maps; coarser levels are max-pooled.

    Args:
        in_levels: C2..C5, finest first.
        config: its switches.
            channels: d (256).
            levels: "p3-p7" (the paper's) or "p2-p6".
            stacks: how often the cells are repeated (7).
            attention: "coarse_max", H + sigmoid(max of H) * L of a coarse map H and a fine map L, as the authors' code; or
                "fine_mean", L + sigmoid(mean of L) * H, as mmcv's. Maximum and mean are each channel's over its cells.
            norm: behind each convolution; batch norm in the paper.
    """

    has_lateral = has_top_down = True

    def __init__(self, in_levels: Sequence[Level], config: NASFPNNeck) -> None:
        super().__init__()
        self.inputs = InputLevels(in_levels, config.level_names, config.channels, config.norm)
        self.stacks = nn.ModuleList(Cells(config.channels, config.attention, config.norm) for _ in range(config.stacks))
        self.levels = self.inputs.levels

    def forward(self, features: Features) -> Features:
        """Return the levels (N, d, Hi, Wi), finest first."""
        maps = self.inputs(features)
        names, values = list(maps), list(maps.values())
        for stack in self.stacks:
            values = stack(values)
        return dict(zip(names, values, strict=True))


class Cells(nn.Module):
    """One pass of the seven cells. A cell resamples its inputs to its level, merges them, then ReLU and a 3x3 convolution."""

    def __init__(self, channels: int, attention: str, norm: Norm) -> None:
        super().__init__()
        self.attention = attention
        self.convs = nn.ModuleList(convolution(channels, channels, 3, norm) for _ in CELLS)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Map five levels (N, d, Hi, Wi), finest first, to five new ones."""
        nodes, levels = list(maps), list(range(len(maps)))
        for (level, operation, *pair), conv in zip(CELLS, self.convs, strict=True):
            first, second = (resample(nodes[n], level - levels[n], maps[level].shape[-2:]) for n in pair)
            merged = first + second if operation == "sum" else self._attend(first, second)
            if (unused := UNUSED.get(len(nodes))) is not None:
                merged = merged + maps[unused]
            nodes.append(conv(F.relu(merged)))
            levels.append(level)
        return [nodes[n] for n in OUT]

    def _attend(self, coarse: Tensor, fine: Tensor) -> Tensor:
        if self.attention == "coarse_max":
            return coarse + coarse.amax((2, 3), keepdim=True).sigmoid() * fine
        return fine + fine.mean((2, 3), keepdim=True).sigmoid() * coarse

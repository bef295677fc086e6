"""Path aggregation network: a bottom-up path behind FPN (Liu et al., CVPR 2018, arXiv:1803.01534, Sec. 3.1).

Shape letters: N images, d channels, Hi x Wi cells of level i.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import nn

from fpn_ablate.config.parts import PAFPNNeck
from fpn_ablate.model.necks.fpn import FPN
from fpn_ablate.model.necks.layers import convolution
from fpn_ablate.structures.levels import Features, Level


class PAFPN(FPN):
    """FPN, then N2 = P2 and N_{k+1} = 3x3(P_{k+1} + stride-2 3x3(N_k)); P6 and coarser levels come from N5.

    Args:
        in_levels: C2..C5, finest first.
        config: FPN's switches, and
            chain: what the next stride-2 convolution reads: the level's "output" (the paper), or the "sum" before its 3x3
                (mmdetection).
            act: "relu" behind each convolution of the path (the paper), or "none" (their code without norm, mmdetection).
    """

    def __init__(self, in_levels: Sequence[Level], config: PAFPNNeck) -> None:
        super().__init__(in_levels, config)
        channels, norm = config.channels, config.norm
        self.chain = config.chain
        self.act = F.relu if config.act == "relu" else lambda x: x
        coarser = self.outputs[1:]
        self.down = nn.ModuleDict({n: convolution(channels, channels, 3, norm, stride=2) for n in coarser})
        self.path = nn.ModuleDict({n: convolution(channels, channels, 3, norm) for n in coarser})

    def forward(self, features: Features) -> Features:
        """Return the levels (N, d, Hi, Wi), finest first."""
        maps = self.pyramid(features)
        chained = maps[self.outputs[0]]
        for name in self.outputs[1:]:
            merged = maps[name] + self.act(self.down[name](chained))
            maps[name] = self.act(self.path[name](merged))
            chained = merged if self.chain == "sum" else maps[name]
        return self.add_coarser(maps, features)

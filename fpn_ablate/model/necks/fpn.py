"""Feature pyramid network: from C2..C5 to P2..P6 (or P3..P7), which the heads read (Sec. 3, Fig. 3). Every part has a switch.

A switch that is off builds nothing.

Shape letters: N images of H x W pixels, d channels, Hi x Wi = ceil(H / 2^i) x ceil(W / 2^i) cells of C_i and P_i.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fpn_ablate.config.parts import FPNNeck
from fpn_ablate.model.necks.base import Neck
from fpn_ablate.model.necks.upsample import Deconvolution, bilinear
from fpn_ablate.structures.levels import Features, Level


class FPN(Neck):
    """Feature pyramid network.

    Args:
        in_levels: C2..C5, finest first.
        config: its switches.
            channels: d, the width of every extra layer (Sec. 3: 256). No non-linearities in the extra layers.
            top_down: add the upsampled coarser map. Off: Table 1 (d).
            lateral: 1x1 convolutions on C2..C4. Off: Table 1 (e), everything comes from C5.
            output: "pyramid", or the only level to return, e.g. "p2": Table 1 (f).
            upsample: "nearest" (the paper's), "bilinear" or "deconv".
            upsample_init: weights that "deconv" starts from, "bilinear" or "random".
            smooth: 3x3 convolutions on "all" maps (Detectron), on "merged" maps only, which P5 is not (the other reading
                of "each merged map"), or "none".
            p6: "subsample" (stride-2 subsampling of P5, the paper's), "conv" (a stride-2 convolution on P5), "conv_c5" (on C5,
                RetinaNet's) or "none". Only a pyramid has it.
            levels: "p2-p6", or "p3-p7" (RetinaNet's). P7 is made from P6 as P6 is, by a convolution with ReLU before it.
    """

    def __init__(self, in_levels: Sequence[Level], config: FPNNeck) -> None:
        super().__init__()
        channels = config.channels
        in_levels = [spec for spec in in_levels if spec.name != "c2" or config.levels == "p2-p6"]
        self.has_lateral, self.has_top_down, self.upsample = config.lateral, config.top_down, config.upsample
        names = [spec.name.replace("c", "p") for spec in in_levels]
        self.outputs = names if config.output == "pyramid" else [config.output]
        coarsest, finest = names[-1], self.outputs[0]
        self.deepest = (coarsest if config.top_down else self.outputs[-1]).replace("p", "c")
        # Maps that the outputs depend on: their own, and with the top-down path all coarser ones.
        self.computed = [n for n in names if n >= finest] if config.top_down else list(self.outputs)
        self.lateral = nn.ModuleDict(
            {
                spec.name.replace("c", "p"): nn.Conv2d(spec.channels, channels, 1)
                for spec in in_levels
                if spec.name.replace("c", "p") in self.computed and (config.lateral or spec is in_levels[-1])
            }
        )
        steps = [n for n in self.computed if n != coarsest] if config.top_down else []
        learned = steps if config.upsample == "deconv" else []
        self.up = nn.ModuleDict({n: Deconvolution(channels, config.upsample_init) for n in learned})
        merged = {"all": set(names), "merged": set(names) - {coarsest}, "none": set()}[config.smooth]
        self.smooth = nn.ModuleDict({n: nn.Conv2d(channels, channels, 3, padding=1) for n in self.outputs if n in merged})
        # A neck that is derived from this one may do more with these maps than return them.
        self.final_convs = [f"smooth.{n}" for n in self.smooth] if type(self).forward is FPN.forward else ()
        self.levels = tuple(Level(n, channels) for n in config.level_names)
        self.p6, self.extra = config.p6, [n for n in config.level_names if n > coarsest]
        convolved = self.extra if config.p6 != "subsample" else []
        width = in_levels[-1].channels if config.p6 == "conv_c5" else channels
        self.p6_conv = nn.ModuleDict({n: nn.Conv2d(width, channels, 3, 2, 1) for n in convolved[:1]})
        self.p7_conv = nn.ModuleDict({n: nn.Conv2d(channels, channels, 3, 2, 1) for n in convolved[1:]})

    def forward(self, features: Features) -> Features:
        """Return the levels (N, d, Hi, Wi), finest first."""
        # Step 1, laterals: bring the maps to one width. Without laterals only C5 has one.
        maps = {n: self.lateral[n](features[n.replace("p", "c")]) for n in self.lateral}
        # Step 2, top-down: coarse to fine, upsample to the size of the finer map and add.
        if self.has_top_down:
            for fine, coarse in list(zip(self.computed, self.computed[1:], strict=False))[::-1]:
                upsampled = self._upsample(fine, maps[coarse], features[fine.replace("p", "c")].shape[-2:])
                maps[fine] = maps[fine] + upsampled if fine in maps else upsampled
        # Step 3, outputs: a 3x3 convolution reduces the aliasing of upsampling.
        out = {n: self.smooth[n](maps[n]) if n in self.smooth else maps[n] for n in self.outputs}
        # Step 4, coarser levels, which no backbone map has.
        for n in self.extra:
            finer = next(reversed(out.values()))
            if self.p6 == "subsample":
                out[n] = finer[..., ::2, ::2]
            elif n == "p6":
                out[n] = self.p6_conv[n](features["c5"] if self.p6 == "conv_c5" else finer)
            else:
                out[n] = self.p7_conv[n](F.relu(finer))
        return out

    def _upsample(self, fine: str, x: Tensor, size: Sequence[int]) -> Tensor:
        if self.upsample == "deconv":
            return self.up[fine](x, size)
        if self.upsample == "bilinear":
            return bilinear(x, size)
        return F.interpolate(x, size=size, mode="nearest")

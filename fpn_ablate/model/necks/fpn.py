"""Feature pyramid network: from C2..C5 to P2..P6, which the heads read (Sec. 3, Fig. 3), with a switch for every part.

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
            p6: "subsample" (stride-2 subsampling of P5, the paper's), "conv" (RetinaNet's stride-2 convolution on P5) or
                "none". Only a pyramid has it.
    """

    def __init__(self, in_levels: Sequence[Level], config: FPNNeck) -> None:
        super().__init__()
        channels = config.channels
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
        self.p6 = config.p6 if config.output == "pyramid" else "none"
        self.p6_conv = nn.ModuleDict({"p6": nn.Conv2d(channels, channels, 3, 2, 1)} if self.p6 == "conv" else {})
        published = self.outputs + (["p6"] if self.p6 != "none" else [])
        self.levels = tuple(Level(n, channels) for n in published)

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
        if self.p6 == "subsample":
            out["p6"] = out["p5"][..., ::2, ::2]
        elif self.p6 == "conv":
            out["p6"] = self.p6_conv["p6"](out["p5"])
        return out

    def _upsample(self, fine: str, x: Tensor, size: Sequence[int]) -> Tensor:
        if self.upsample == "deconv":
            return self.up[fine](x, size)
        if self.upsample == "bilinear":
            return bilinear(x, size)
        return F.interpolate(x, size=size, mode="nearest")

"""Backbones: C2..C5, the output of the last block of each stage (Sec. 3), with strides 4, 8, 16, 32.

conv1 (the stem) is left out of the pyramid, as in the paper, for its memory.

Shape letters: N images of H x W pixels.
"""

from torch import Tensor, nn

from fpn_ablate.model.backbones.batch_norm import freeze_batch_norm
from fpn_ablate.structures.levels import Features, Level

# Stages that can be frozen, in order; `freeze_at=2` freezes the stem and conv2.
STAGES = ("stem", "c2", "c3", "c4", "c5")
# ImageNet's statistics, RGB in 0..1. All backbones are trained with them, except some of timm.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Backbone(nn.Module):
    """Five stages.

    Attributes:
        levels: C2..C5.
        out_channels: the width of C5, the classifier's input.
        mean, std: of the images that it reads, RGB in 0..1.
    """

    def __init__(
        self,
        stages: dict[str, nn.Module],
        channels: tuple[int, int, int, int],
        mean: tuple[float, float, float] = MEAN,
        std: tuple[float, float, float] = STD,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleDict(stages)
        self.levels = tuple(Level(name, width) for name, width in zip(STAGES[1:], channels, strict=True))
        self.out_channels = channels[-1]
        self.mean, self.std = tuple(mean), tuple(std)

    def forward(self, images: Tensor) -> Features:
        """Return {"c2": ..., "c5": ...} of normalised images (N, 3, H, W)."""
        features = {}
        x = images
        for name, stage in self.stages.items():
            x = stage(x)
            features[name] = x
        del features["stem"]
        return features

    def truncate(self, deepest: str) -> dict[str, nn.Module]:
        """Take out the stages behind `deepest` ("c4"), which the neck does not read, and return them: {"c5": ...}."""
        return {name: self.stages.pop(name) for name in STAGES[STAGES.index(deepest) + 1 :]}

    def freeze(self, freeze_at: int) -> None:
        """Exclude the first `freeze_at` stages from training, their batch statistics included; 0 freezes none.

        Not in the paper: Detectron freezes the stem and conv2.
        """
        for name in list(self.stages)[:freeze_at]:
            freeze_batch_norm(self.stages[name].requires_grad_(False))

"""Backbones: C2..C5, the output of the last block of each stage (Sec. 3), with strides 4, 8, 16, 32.

conv1 (the stem) is left out of the pyramid, as in the paper, for its memory.

Shape letters: N images of H x W pixels.
"""

import torch
from torch import Tensor, nn

from fpn_ablate.model.backbones.batch_norm import freeze_batch_norm
from fpn_ablate.structures.levels import Features, Level

# Stages that can be frozen, in order; `freeze_at=2` freezes the stem and conv2.
STAGES = ("stem", "c2", "c3", "c4", "c5")
# ImageNet's statistics, RGB in 0..1. All backbones are trained with them, except some of timm.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Backbone(nn.Module):
    """Five stages that run one after the other: "stem", "c2", "c3", "c4", "c5".

    Args:
        stages: by name. The maps of C2..C5 have strides 4, 8, 16 and 32, and ceil(side / stride) cells.
        channels: widths of C2..C5.
        mean, std: of the images that it reads, RGB in 0..1.
        runs_in_order: True if every block lists its layers in the order in which they run; a faster variant then folds a frozen
            batch norm into the convolution that is listed before it.
        map_norms: norms of maps on their way to the neck, by the map's name; the next stage reads the map without.

    Attributes:
        levels: C2..C5.
        out_channels: the width of C5, the classifier's input.
    """

    def __init__(
        self,
        stages: dict[str, nn.Module],
        channels: tuple[int, int, int, int],
        mean: tuple[float, float, float] = MEAN,
        std: tuple[float, float, float] = STD,
        runs_in_order: bool = False,
        map_norms: dict[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.runs_in_order = runs_in_order
        self.stages = nn.ModuleDict(stages)
        self.map_norms = nn.ModuleDict(map_norms or {})
        self.levels = tuple(Level(name, width) for name, width in zip(STAGES[1:], channels, strict=True))
        self.out_channels = channels[-1]
        self.mean, self.std = tuple(mean), tuple(std)
        for name, values in (("_mean", mean), ("_std", std)):
            self.register_buffer(name, torch.tensor(values)[:, None, None] * 255, persistent=False)

    def normalise(self, images: Tensor, sizes: Tensor) -> Tensor:
        """Normalise images (N, 3, H, W) in 0..255 to mean 0 and deviation 1; outside `sizes` (N, 2) to 0."""
        x = (images - self._mean) / self._std
        inside_y = torch.arange(images.shape[2], device=images.device) < sizes[:, :1]
        inside_x = torch.arange(images.shape[3], device=images.device) < sizes[:, 1:]
        return x * (inside_y[:, None, :, None] & inside_x[:, None, None, :])

    def forward(self, images: Tensor) -> Features:
        """Return {"c2": ..., "c5": ...} of normalised images (N, 3, H, W)."""
        features = {}
        x = images
        for name, stage in self.stages.items():
            x = stage(x)
            features[name] = self.map_norms[name](x) if name in self.map_norms else x
        del features["stem"]
        return features

    def truncate(self, deepest: str) -> dict[str, nn.Module]:
        """Take out the stages behind `deepest` ("c4"), which the neck does not read, and return them: {"c5": ...}."""
        removed = list(self.stages)[STAGES.index(deepest) + 1 :]
        for name in removed:
            if name in self.map_norms:
                del self.map_norms[name]
        return {name: self.stages.pop(name) for name in removed}

    def init_parameter(self, layer: nn.Module, parameter: Tensor, generator: torch.Generator) -> bool:
        """Draw the weights of convolutions as He et al. (see `init.initialise`)."""
        if is_convolution := parameter.dim() > 1 and isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(parameter, mode="fan_out", generator=generator)
        return is_convolution

    def freeze(self, freeze_at: int) -> None:
        """Exclude the first `freeze_at` stages from training, their batch statistics included; 0 freezes none.

        Not in the paper: Detectron freezes the stem and conv2.
        """
        for name in list(self.stages)[:freeze_at]:
            freeze_batch_norm(self.stages[name].requires_grad_(False))

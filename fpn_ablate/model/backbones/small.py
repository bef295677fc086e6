"""Small ResNets that train in minutes on a CPU."""

from torch import Tensor, nn

from fpn_ablate.config import parts
from fpn_ablate.model.backbones.base import STAGES, Backbone

CHANNELS = (24, 48, 96, 192)  # of C2..C5
DEPTHS = {"small": 1, "small_deep": 2}  # blocks a stage


class SmallBlock(nn.Module):
    """Basic residual block: two 3x3 convolutions."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def small_resnet(config: parts.Backbone) -> Backbone:
    """Build a ResNet of one basic block a stage, or of two ("small_deep")."""
    depth, first = DEPTHS[config.name], CHANNELS[0]
    stem = nn.Sequential(
        nn.Conv2d(3, first, 5, 2, 2, bias=False),
        nn.BatchNorm2d(first),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
    )
    stages: dict[str, nn.Module] = {"stem": stem}
    for name, before, after, stride in zip(STAGES[1:], (first, *CHANNELS), CHANNELS, (1, 2, 2, 2), strict=False):
        blocks = [SmallBlock(before, after, stride)] + [SmallBlock(after, after, 1) for _ in range(depth - 1)]
        stages[name] = nn.Sequential(*blocks) if depth > 1 else blocks[0]
    return Backbone(stages, CHANNELS, runs_in_order=True)

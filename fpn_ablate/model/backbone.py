"""Backbones: C2..C5, the output of the last block of each stage (Sec. 3), with strides 4, 8, 16, 32.

N images of H x W pixels. conv1 (the stem) is left out of the pyramid, as in the paper, for its memory.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck
from torchvision.ops import FrozenBatchNorm2d

from fpn_ablate.model.layers import Conv2d
from fpn_ablate.model.levels import Features, Level

# Stages that can be frozen, in order; `freeze_at=2` freezes the stem and conv2.
STAGES = ("stem", "c2", "c3", "c4", "c5")
# First layer and the one after the last of each stage, of MobileNetV2's features; a slice keeps the numbers of its layers.
MOBILENET_CUTS = {"stem": (0, 2), "c2": (2, 4), "c3": (4, 7), "c4": (7, 14), "c5": (14, 18)}
# ImageNet's statistics, RGB in 0..1; all backbones but some of timm are or were trained with them.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Backbone(nn.Module):
    """Five stages. `levels` says what C2..C5 are; `out_channels` is C5's width (the classifier's input); `mean` and `std` are
    those of the images that it reads, RGB in 0..1."""

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
        """(N, 3, H, W) normalised images -> {"c2": ..., "c5": ...}."""
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
        """Take the first `freeze_at` stages out of training, their batch statistics included; 0 freezes none. Not in the
        paper: Detectron freezes the stem and conv2."""
        for name in list(self.stages)[:freeze_at]:
            freeze_batch_norm(self.stages[name].requires_grad_(False))


class FrozenBatchNormAct2d(FrozenBatchNorm2d):
    """Of a BatchNorm that carries its activation in it, as timm's `BatchNormAct2d`: the activation stays."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(norm.num_features, eps=norm.eps)
        self.drop, self.act = norm.drop, norm.act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


def freeze_batch_norm(module: nn.Module) -> nn.Module:
    """Replace every BatchNorm by its affine form with the statistics it has (Detectron's default for fine-tuning)."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            active = hasattr(child, "act")
            frozen = FrozenBatchNormAct2d(child) if active else FrozenBatchNorm2d(child.num_features, eps=child.eps)
            frozen.load_state_dict({k: v for k, v in child.state_dict().items() if k != "num_batches_tracked"})
            setattr(module, name, frozen.to(child.weight.device))
        else:
            freeze_batch_norm(child)
    return module


class FoldedConv2d(Conv2d):
    """A convolution that works out the frozen batch norm behind it as well, in its weights."""

    def forward(self, x: Tensor) -> Tensor:
        (norm,) = self._norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        bias = norm.bias - norm.running_mean * scale
        if self.bias is not None:
            bias = bias + self.bias * scale
        return self._conv_forward(x, self.weight * scale[:, None, None, None], bias)


class FoldedBatchNorm2d(FrozenBatchNorm2d):
    """What is left of a frozen batch norm in front of which a `FoldedConv2d` stands: its numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def fold_batch_norm(module: nn.Module) -> nn.Module:
    """Let each convolution work out the frozen batch norm that comes right behind it, for as many passes over its output less.

    For networks whose blocks name their layers in the order in which they run, which torchvision's and ours do. Names, weights
    and gradients stay.
    """
    for parent in module.modules():
        children = list(parent.children())
        for conv, norm in pairwise(children):
            if type(conv) in (nn.Conv2d, Conv2d) and type(norm) is FrozenBatchNorm2d:
                conv.__class__, norm.__class__ = FoldedConv2d, FoldedBatchNorm2d
                conv._norm = (norm,)  # in a tuple, so that it is no module of the convolution's as well
    return module


def unfold_batch_norm(module: nn.Module) -> nn.Module:
    """The inverse of `fold_batch_norm`."""
    for m in module.modules():
        if isinstance(m, FoldedConv2d):
            m.__class__ = nn.Conv2d
        elif isinstance(m, FoldedBatchNorm2d):
            m.__class__ = FrozenBatchNorm2d
    return module


def stride_to_1x1(backbone: Backbone) -> None:
    """Halve the resolution in the first 1x1 convolution of a bottleneck, as He et al. (2015), Caffe and detectron2's models do;
    torchvision does it in the 3x3. Weights keep their names and shapes, and compute something else."""
    for module in backbone.modules():
        if isinstance(module, Bottleneck):
            module.conv1.stride, module.conv2.stride = module.conv2.stride, (1, 1)


def has_stride_in_1x1(backbone: nn.Module) -> bool:
    """Is one of its bottlenecks as `stride_to_1x1` makes them?"""
    return any(isinstance(m, Bottleneck) and m.conv1.stride != (1, 1) for m in backbone.modules())


class SmallBlock(nn.Module):
    """A basic residual block (two 3x3 convolutions) for the small backbones."""

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


def small_resnet(depth: int = 1, channels: tuple[int, int, int, int] = (24, 48, 96, 192)) -> Backbone:
    """`depth` basic blocks a stage: a ResNet that trains in minutes on a CPU."""
    first = channels[0]
    stem = nn.Sequential(
        nn.Conv2d(3, first, 5, 2, 2, bias=False),
        nn.BatchNorm2d(first),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
    )
    stages: dict[str, nn.Module] = {"stem": stem}
    for name, before, after, stride in zip(STAGES[1:], (first, *channels), channels, (1, 2, 2, 2), strict=False):
        blocks = [SmallBlock(before, after, stride)] + [SmallBlock(after, after, 1) for _ in range(depth - 1)]
        stages[name] = nn.Sequential(*blocks) if depth > 1 else blocks[0]
    return Backbone(stages, channels)


def torchvision_resnet(name: str) -> Callable[[], Backbone]:
    def build() -> Backbone:
        net = getattr(torchvision.models, name)(weights=None)
        stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        # The width of a stage is that of its last convolution: basic and bottleneck blocks name it differently.
        last = [m for m in net.layer4.modules() if isinstance(m, nn.Conv2d)][-1].out_channels
        stages = {"c2": net.layer1, "c3": net.layer2, "c4": net.layer3, "c5": net.layer4}
        return Backbone({"stem": stem, **stages}, (last // 8, last // 4, last // 2, last))

    return build


def mobilenet_v2() -> Backbone:
    """torchvision's MobileNetV2, cut where its stride doubles."""
    net = torchvision.models.mobilenet_v2(weights=None).features
    return Backbone({name: net[a:b] for name, (a, b) in MOBILENET_CUTS.items()}, (24, 32, 96, 320))


BACKBONES: dict[str, Callable[[], Backbone]] = {
    "small": small_resnet,
    "small_deep": partial(small_resnet, depth=2),
    "mobilenet_v2": mobilenet_v2,
    **{name: torchvision_resnet(name) for name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")},
}

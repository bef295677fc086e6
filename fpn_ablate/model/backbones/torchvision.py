"""Cut torchvision's ResNets and MobileNetV2 into the stages of a `Backbone`."""

from collections.abc import Callable

import torchvision
from torch import nn
from torchvision.models.resnet import Bottleneck

from fpn_ablate.model.backbones.base import Backbone

# First layer and the one after the last of each stage, of MobileNetV2's features; a slice keeps the numbers of its layers.
MOBILENET_CUTS = {"stem": (0, 2), "c2": (2, 4), "c3": (4, 7), "c4": (7, 14), "c5": (14, 18)}


def stride_to_1x1(backbone: Backbone) -> None:
    """Halve the resolution in the first 1x1 convolution of a bottleneck, as He et al. (2015), Caffe and detectron2's models do;
    torchvision does it in the 3x3. Weights keep their names and shapes, and compute something else."""
    for module in backbone.modules():
        if isinstance(module, Bottleneck):
            module.conv1.stride, module.conv2.stride = module.conv2.stride, (1, 1)


def has_stride_in_1x1(backbone: nn.Module) -> bool:
    """Is one of its bottlenecks as `stride_to_1x1` makes them?"""
    return any(isinstance(m, Bottleneck) and m.conv1.stride != (1, 1) for m in backbone.modules())


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

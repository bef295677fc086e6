"""Cut torchvision's ResNets and MobileNetV2 into the stages of a `Backbone`, with the names of their weights unchanged."""

import torchvision
from torch import nn
from torchvision.models.resnet import Bottleneck

from fpn_ablate.config import parts
from fpn_ablate.model.backbones.base import Backbone

# First layer of each stage of MobileNetV2's features, and the one after its last. Slices keep the numbers of the layers.
MOBILENET_CUTS = {"stem": (0, 2), "c2": (2, 4), "c3": (4, 7), "c4": (7, 14), "c5": (14, 18)}


def stride_to_1x1(backbone: Backbone) -> None:
    """Move the stride of each bottleneck to its first 1x1 convolution, as in He et al. (2015), Caffe and detectron2's models.

    torchvision has it in the 3x3. Weights keep their names and shapes, but compute something else.
    """
    for module in backbone.modules():
        if isinstance(module, Bottleneck):
            module.conv1.stride, module.conv2.stride = module.conv2.stride, (1, 1)


def has_stride_in_1x1(backbone: nn.Module) -> bool:
    """Return whether a bottleneck has its stride where `stride_to_1x1` puts it."""
    return any(isinstance(m, Bottleneck) and m.conv1.stride != (1, 1) for m in backbone.modules())


def torchvision_resnet(config: parts.Backbone) -> Backbone:
    """Build torchvision's ResNet `config.name`."""
    net = getattr(torchvision.models, config.name)(weights=None)
    stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
    # A stage is as wide as its last convolution, which basic and bottleneck blocks name differently.
    last = [m for m in net.layer4.modules() if isinstance(m, nn.Conv2d)][-1].out_channels
    stages = {"stem": stem, "c2": net.layer1, "c3": net.layer2, "c4": net.layer3, "c5": net.layer4}
    backbone = Backbone(stages, (last // 8, last // 4, last // 2, last), runs_in_order=True)
    if config.stride_in_1x1:
        stride_to_1x1(backbone)
    return backbone


def torchvision_mobilenet(config: parts.Backbone) -> Backbone:
    """Build torchvision's MobileNetV2, cut where its stride doubles."""
    net = torchvision.models.mobilenet_v2(weights=None).features
    stages = {name: net[a:b] for name, (a, b) in MOBILENET_CUTS.items()}
    return Backbone(stages, (24, 32, 96, 320), runs_in_order=True)

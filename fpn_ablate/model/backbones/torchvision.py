"""Cut torchvision's networks into the stages of a `Backbone`, with the names of their weights unchanged."""

import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.resnet import Bottleneck

from fpn_ablate.config import parts
from fpn_ablate.model.backbones.base import STAGES, Backbone
from fpn_ablate.model.layers import L2Norm

# First layer of each stage of a network's `features`, and at the end the one after the last. Slices keep the numbers of the
# layers. The last layer of a stage is the last one of its stride (Sec. 3); VGG's C5 is its fifth pooling.
FEATURES = {
    "mobilenet_v2": (0, 2, 4, 7, 14, 18),
    "mobilenet_v3_large": (0, 2, 4, 7, 13, 16),
    "vgg16": (0, 10, 16, 23, 30, 31),
    "convnext_tiny": (0, 1, 2, 4, 6, 8),
}


def cut(features: nn.Sequential, name: str) -> dict[str, nn.Module]:
    """Return the stages of a network's `features`."""
    starts = FEATURES[name]
    return {stage: features[a:b] for stage, a, b in zip(STAGES, starts, starts[1:], strict=False)}


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
    """Build torchvision's MobileNetV2 or V3, cut where its stride doubles."""
    net = getattr(torchvision.models, config.name)(weights=None).features
    channels = {"mobilenet_v2": (24, 32, 96, 320), "mobilenet_v3_large": (24, 40, 112, 160)}[config.name]
    return Backbone(cut(net, config.name), channels, runs_in_order=True)


def torchvision_vgg(config: parts.PlainBackbone) -> Backbone:
    """Build torchvision's VGG-16: C2..C5 are conv3_3, conv4_3, conv5_3 and pool5.

    With `map_norm`, conv3_3 and conv4_3 are L2-normalised on their way to the neck, as SSD does with conv4_3.
    """
    widths = [round(config.width * channels) for channels in (64, 128, 256, 512, 512)]
    layers = [layer for width, depth in zip(widths, (2, 2, 3, 3, 3), strict=True) for layer in [width] * depth + ["M"]]
    net = torchvision.models.vgg.make_layers(layers)
    for layer in net:
        if isinstance(layer, nn.MaxPool2d):
            layer.ceil_mode = True  # keeps the last row and column of a map of odd size
    channels = (*widths[2:], widths[-1])
    norms = {name: L2Norm(width) for name, width in zip(("c2", "c3"), channels, strict=False) if config.map_norm}
    return Backbone(cut(net, "vgg16"), channels, runs_in_order=True, map_norms=norms)


class PaddedConv2d(nn.Conv2d):
    """Convolution of windows that do not overlap; a map is padded to whole windows."""

    def forward(self, x: Tensor) -> Tensor:
        (height, width), (rows, columns) = x.shape[-2:], self.stride
        return super().forward(F.pad(x, (0, -width % columns, 0, -height % rows)))


def torchvision_convnext(config: parts.PlainBackbone) -> Backbone:
    """Build torchvision's ConvNeXt-T; with `map_norm` each map has a layer norm on its way to the neck."""
    net = torchvision.models.convnext_tiny(weights=None, stochastic_depth_prob=0.0).features
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.stride != (1, 1):
            module.__class__ = PaddedConv2d
    channels = (96, 192, 384, 768)
    norms = {name: LayerNorm2d(width, eps=1e-6) for name, width in zip(STAGES[1:], channels, strict=True) if config.map_norm}
    return Backbone(cut(net, "convnext_tiny"), channels, map_norms=norms)

"""List the built-in backbones by their `name` in the configuration."""

from collections.abc import Callable
from functools import partial

from fpn_ablate.model.backbones.base import Backbone
from fpn_ablate.model.backbones.small import small_resnet
from fpn_ablate.model.backbones.torchvision import mobilenet_v2, torchvision_resnet

BACKBONES: dict[str, Callable[[], Backbone]] = {
    "small": small_resnet,
    "small_deep": partial(small_resnet, depth=2),
    "mobilenet_v2": mobilenet_v2,
    **{name: torchvision_resnet(name) for name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")},
}

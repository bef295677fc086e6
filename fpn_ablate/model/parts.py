"""List the built-in parts of each kind by their name in the configuration. No run's identity depends on these lists."""

from collections.abc import Callable
from typing import Any

from torch import nn

from fpn_ablate.model.backbones.base import Backbone
from fpn_ablate.model.backbones.small import small_resnet
from fpn_ablate.model.backbones.timm import timm_backbone
from fpn_ablate.model.backbones.torchvision import torchvision_mobilenet, torchvision_resnet
from fpn_ablate.model.detectors.image_pyramid import ImagePyramid
from fpn_ablate.model.heads.box_head import Conv5, TwoFC
from fpn_ablate.model.heads.dense import DenseHead
from fpn_ablate.model.heads.fcos import FCOSHead
from fpn_ablate.model.heads.mask_head import FCN, MLP
from fpn_ablate.model.heads.retinanet import RetinaNetHead
from fpn_ablate.model.heads.rpn import RPNHead
from fpn_ablate.model.heads.ssd import SSDHead
from fpn_ablate.model.heads.yolo import YOLOHead
from fpn_ablate.model.necks.base import Neck
from fpn_ablate.model.necks.fpn import FPN
from fpn_ablate.model.necks.hierarchy import Hierarchy
from fpn_ablate.model.necks.single_level import SingleLevel

# Constructed from the configuration.
BACKBONES: dict[str, Callable[[Any], Backbone]] = {
    "small": small_resnet,
    "small_deep": small_resnet,
    **dict.fromkeys(("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"), torchvision_resnet),
    "mobilenet_v2": torchvision_mobilenet,
    "timm": timm_backbone,
}
# Constructed from the backbone's levels and the configuration.
NECKS: dict[str, Callable[..., Neck]] = {"fpn": FPN, "single_level": SingleLevel, "hierarchy": Hierarchy}
# Constructed from the levels' width and the number of anchors a cell.
RPN_HEADS: dict[str, Callable[[int, int], nn.Module]] = {"conv": RPNHead}
# Constructed by their `from_config`.
BOX_HEADS: dict[str, type[TwoFC] | type[Conv5]] = {"2fc": TwoFC, "conv5": Conv5}
# Constructed from the configuration, the features' width and resolution, and the number of classes.
MASK_HEADS: dict[str, type[FCN] | type[MLP]] = {"fcn": FCN, "mlp": MLP}
# Constructed from the levels, the task's configuration, the number of classes and the images' short side; by the task's name.
DENSE_HEADS: dict[str, type[DenseHead]] = {"retinanet": RetinaNetHead, "fcos": FCOSHead, "yolo": YOLOHead, "ssd": SSDHead}
# Constructed from backbone, neck, RPN and second stage, the configuration, the input's short side and how images are resized.
DETECTORS: dict[str, type[ImagePyramid]] = {"image_pyramid": ImagePyramid}

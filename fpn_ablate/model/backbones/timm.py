"""Any convolutional or windowed network of timm as a `Backbone`: C2..C5 are its maps of strides 4, 8, 16 and 32.

timm extracts features from a network that it runs as a sequence of modules. We distribute these modules over our five stages,
under timm's names, so that truncation, freezing and the conv5 head work as for any backbone.
timm is an extra (pip install "fpn-ablate[timm]"), imported only when a backbone needs it.

Shape letters: N images of H x W pixels or cells, C channels.
"""

import difflib
from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

from fpn_ablate.config.parts import TimmBackbone
from fpn_ablate.model.backbones.base import STAGES, Backbone
from fpn_ablate.utils.errors import UserError, first_line

STRIDES = (4, 8, 16, 32)
# For networks that are built for one image size: accept any size, with the same windows, shifted in every second block.
ANY_SIZE = {"strict_img_size": False, "always_partition": True}
ADVICE = "Take a network with stages (ResNeXt, ConvNeXt, VGG, Swin, EfficientNet, ...), not a plain ViT"


class ChannelsLast(nn.Sequential):
    """Modules that work on (N, H, W, C), with maps (N, C, H, W) as input and output."""

    reads_images = False  # the stem: its input is images (N, 3, H, W), which its modules read as they are

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.reads_images else x.permute(0, 2, 3, 1)
        return super().forward(x).permute(0, 3, 1, 2)


def timm_backbone(config: TimmBackbone, pretrained: bool = False) -> Backbone:
    """Build timm's `config.model` as a backbone, with random weights or, with `pretrained`, with timm's, which are downloaded.

    Raises:
        UserError: timm or the model is missing, or the model has no sequence of maps of strides 4, 8, 16 and 32.
    """
    model = config.model
    net, weights = _network(model, pretrained)
    info = net.feature_info
    if missing := [str(stride) for stride in STRIDES if stride not in info.reduction()]:
        raise UserError(
            f"backbone=timm/{model}: its maps have strides {', '.join(map(str, info.reduction()))}; a pyramid needs "
            f"4, 8, 16 and 32, and {', '.join(missing)} is missing. {ADVICE}"
        )
    children = _children(model, net)
    names = list(children)
    # A stride can occur twice (a stem, then a stage of stride 1): the last one is the stage's.
    last_idxs = dict(zip(info.reduction(), (names.index(name) for name in _feature_names(net)), strict=True))
    ends = [last_idxs[stride] + 1 for stride in STRIDES]
    stem_taps = [idx for stride, idx in last_idxs.items() if stride < STRIDES[0]]
    starts = [_first_of_c2(children, names, stem_taps, ends[0]), *ends[:-1]]
    cuts = dict(zip(STAGES, zip([0, *starts], [starts[0], *ends], strict=True), strict=True))
    stages = {
        stage: _stage(OrderedDict((name, children[name]) for name in names[first:last]), net, stage)
        for stage, (first, last) in cuts.items()
    }
    channels = dict(zip(info.reduction(), info.channels(), strict=True))
    return Backbone(stages, tuple(channels[stride] for stride in STRIDES), mean=weights.mean, std=weights.std)


def _network(model: str, pretrained: bool) -> tuple[Any, Any]:
    """Return timm's feature extraction of a model, and the configuration of its weights."""
    try:
        import timm
    except ImportError:
        raise UserError('backbone=timm/...: timm is not installed; pip install "fpn-ablate[timm]"') from None
    if not timm.is_model(model):
        near = difflib.get_close_matches(model, timm.list_models(), n=3)
        hint = f" Did you mean {' or '.join(f'timm/{name}' for name in near)}?" if near else ""
        raise UserError(f"backbone=timm/{model}: timm {timm.__version__} has no such model.{hint}")
    try:
        config = timm.get_pretrained_cfg(model, allow_unregistered=False)
    except Exception:  # timm raises errors of several kinds
        tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{model.partition('.')[0]}.*")]
        raise UserError(f"backbone=timm/{model}: timm has no such weights. It has: {', '.join(tags) or 'none'}") from None
    try:
        try:
            net = timm.create_model(model, pretrained=pretrained, features_only=True, **ANY_SIZE)
        except TypeError:  # most models lack these options and take any size; `contracts` refuses those that do not
            net = timm.create_model(model, pretrained=pretrained, features_only=True)
    except Exception as error:
        reason = first_line(error)
        if not pretrained:
            raise UserError(f"backbone=timm/{model}: cannot be built as a backbone: {reason}") from None
        raise UserError(
            f"backbone.weights=imagenet: timm's weights of {model} cannot be downloaded ({reason}). They are downloaded "
            "once, from the Hugging Face hub. Without a network set backbone.weights to none or to a FILE with a state dict in "
            "timm's names"
        ) from None
    for module in net.modules():  # these would draw from the global generator, and randomness is passed here
        if type(module).__name__ == "DropPath":
            module.drop_prob = 0.0
        elif isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return net, config


def _children(model: str, net: Any) -> dict[str, nn.Module]:
    """Return the modules that timm runs in sequence, in their order, under the names of timm's extraction."""
    from timm.models import FeatureListNet
    from timm.models.efficientnet import EfficientNetFeatures
    from timm.models.mobilenetv3 import MobileNetV3Features

    if type(net) is FeatureListNet:
        return dict(net.items())
    if type(net) in (EfficientNetFeatures, MobileNetV3Features) and net.feature_hooks is None:
        flat = {f"blocks_{name}": block for name, block in net.blocks.named_children()}
        return {name: child for name, child in net.named_children() if name != "blocks"} | flat
    raise UserError(
        f"backbone=timm/{model}: timm extracts its features as a {type(net).__name__}, which is not a sequence of "
        f"modules. {ADVICE}"
    )


def _feature_names(net: Any) -> list[str]:
    """Return the names in `_children` of the modules whose outputs are the features, in the order of `feature_info`."""
    return_layers = getattr(net, "return_layers", None)
    return list(return_layers) if return_layers else [name.replace(".", "_") for name in net.feature_info.module_name()]


def _first_of_c2(children: dict[str, nn.Module], names: list[str], stem_taps: list[int], end: int) -> int:
    """Return the index of C2's first module, given the indices `stem_taps` of maps of strides below 4 and C2's `end`.

    The stem reaches to the last map of a stride below 4 and the pooling behind it. Without such a map, C2 is its last module.
    """
    if not stem_taps:
        return end - 1
    first = max(stem_taps) + 1
    while first < end - 1 and not any(True for _ in children[names[first]].parameters()):
        first += 1
    return first


def _stage(modules: OrderedDict[str, nn.Module], net: Any, stage: str) -> nn.Sequential:
    if str(getattr(getattr(net, "output_fmt", None), "value", "NCHW")) != "NHWC":
        return nn.Sequential(modules)
    sequence = ChannelsLast(modules)
    sequence.reads_images = stage == STAGES[0]
    return sequence

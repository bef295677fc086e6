"""Translate names of tensors between ours, torchvision's, detectron2's and Caffe2's; `convert` translates the values.

Ours: backbone.stages.{stem,c2..c5}, neck.{lateral,smooth}.{p2..p5}, rpn.head.{conv,objectness,deltas}, roi.box_head.{fc6,fc7}
(row c4: roi.box_head.stage, which is conv5), roi.predictor.{scores,deltas}, roi.mask.head.{convs.0..3,deconv,logits}; RetinaNet
neck.{p6,p7}_conv, head.{class,box}_subnet.{0..3}.{0,1} (convolution, norm), head.{scores,deltas}. FCOS: the same neck and
subnets, head.{scores,distances,centerness}.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial

from torch import Tensor

from fpn_ablate.model.backbones.torchvision import MOBILENET_CUTS

OURS, TORCHVISION, DETECTRON2 = "fpn_ablate", "torchvision detector", "detectron2"
RESNET, MOBILENET, CAFFE2 = "torchvision ResNet", "torchvision MobileNetV2", "Caffe2 ResNet"
OUR_BACKBONE, RETINANET, FCOS = "fpn_ablate backbone", "torchvision RetinaNet", "torchvision FCOS"
STAGE = "backbone.stages."
CONV5 = "roi.box_head.stage."
MASK = "roi.mask."
_LEVELS = (2, 3, 4, 5)
_MASK_CONVS = 4  # of torchvision's and detectron2's mask heads
_RESNET = {"conv1": "stem.0", "bn1": "stem.1", **{f"layer{k - 1}": f"c{k}" for k in _LEVELS}}
_PREDICTOR = {
    "roi_heads.box_predictor.cls_score": "roi.predictor.scores",
    "roi_heads.box_predictor.bbox_pred": "roi.predictor.deltas",
}
# Layers outside the backbone, {their name: our name}.
_TORCHVISION = {
    **{f"backbone.fpn.inner_blocks.{k - 2}.0": f"neck.lateral.p{k}" for k in _LEVELS},
    **{f"backbone.fpn.layer_blocks.{k - 2}.0": f"neck.smooth.p{k}" for k in _LEVELS},
    "rpn.head.conv.0.0": "rpn.head.conv",
    "rpn.head.cls_logits": "rpn.head.objectness",
    "rpn.head.bbox_pred": "rpn.head.deltas",
    "roi_heads.box_head.fc6": "roi.box_head.fc6",
    "roi_heads.box_head.fc7": "roi.box_head.fc7",
    **_PREDICTOR,
    **{f"roi_heads.mask_head.{k}.0": f"{MASK}head.convs.{k}" for k in range(_MASK_CONVS)},
    "roi_heads.mask_predictor.conv5_mask": f"{MASK}head.deconv",
    "roi_heads.mask_predictor.mask_fcn_logits": f"{MASK}head.logits",
}
# torchvision before 0.13.
_TORCHVISION_OLD = {
    **{f"backbone.fpn.inner_blocks.{k - 2}": f"neck.lateral.p{k}" for k in _LEVELS},
    **{f"backbone.fpn.layer_blocks.{k - 2}": f"neck.smooth.p{k}" for k in _LEVELS},
    "rpn.head.conv": "rpn.head.conv",
    **{f"roi_heads.mask_head.mask_fcn{k + 1}": f"{MASK}head.convs.{k}" for k in range(_MASK_CONVS)},
}
# Its FPN begins at C3. Files before torchvision 0.13 number convolutions with the ReLUs between them, and have no norms.
_SUBNETS = {"classification_head": "class_subnet", "regression_head": "box_subnet"}
_P3_TO_P7 = {
    **{
        f"backbone.fpn.{block}_blocks.{k - 3}{end}": f"neck.{name}.p{k}"
        for block, name in (("inner", "lateral"), ("layer", "smooth"))
        for k in _LEVELS[1:]
        for end in (".0", "")
    },
    **{f"backbone.fpn.extra_blocks.p{k}": f"neck.p{k}_conv.p{k}" for k in (6, 7)},
    "head.classification_head.cls_logits": "head.scores",
}
_RETINANET = {
    **_P3_TO_P7,
    **{
        f"head.{head}.conv.{k}.{part}": f"head.{subnet}.{k}.{part}"
        for head, subnet in _SUBNETS.items()
        for k in range(4)
        for part in (0, 1)
    },
    **{f"head.{head}.conv.{2 * k}": f"head.{subnet}.{k}.0" for head, subnet in _SUBNETS.items() for k in range(4)},
    "head.regression_head.bbox_reg": "head.deltas",
}
# Convolution, norm, ReLU, convolution, ...
_FCOS = {
    **_P3_TO_P7,
    **{
        f"head.{head}.conv.{3 * k + part}": f"head.{subnet}.{k}.{part}"
        for head, subnet in _SUBNETS.items()
        for k in range(4)
        for part in (0, 1)
    },
    "head.regression_head.bbox_reg": "head.distances",
    "head.regression_head.bbox_ctrness": "head.centerness",
}
_DETECTRON2 = {
    **{f"backbone.fpn_lateral{k}": f"neck.lateral.p{k}" for k in _LEVELS},
    **{f"backbone.fpn_output{k}": f"neck.smooth.p{k}" for k in _LEVELS},
    "proposal_generator.rpn_head.conv": "rpn.head.conv",
    "proposal_generator.rpn_head.objectness_logits": "rpn.head.objectness",
    "proposal_generator.rpn_head.anchor_deltas": "rpn.head.deltas",
    "roi_heads.box_head.fc1": "roi.box_head.fc6",
    "roi_heads.box_head.fc2": "roi.box_head.fc7",
    **_PREDICTOR,
    **{f"roi_heads.mask_head.mask_fcn{k + 1}": f"{MASK}head.convs.{k}" for k in range(_MASK_CONVS)},
    "roi_heads.mask_head.deconv": f"{MASK}head.deconv",
    "roi_heads.mask_head.predictor": f"{MASK}head.logits",
}
# Tensors that our detectors do not have, and that do not change what they detect, where they have no name of ours: classifiers,
# key points, other mask heads, constants.
_IGNORED = {
    RESNET: r"fc\.",
    MOBILENET: r"classifier\.|features\.18\.",
    TORCHVISION: r"roi_heads\.(keypoint|mask)_",
    DETECTRON2: r"(stem\.)?(fc1000|fc|linear)\.|roi_heads\.(keypoint|mask)_head\.|pixel_(mean|std)$|.*\bcell_anchors\b",
    # The reference also drops the bias in front of the stem's batch norm.
    CAFFE2: r"(fc1000|pred|conv1)_b$|(fc1000|pred)_w$|.*_momentum$|(lr|weight_order|model_iter)$",
}
# Networks that are not read, by a name that no other has.
_OTHER_DETECTORS = {
    r"head\.(classification_head|regression_head|cls_|bbox_)": "a detector of one stage (SSD, or one of detectron2)",
    r"backbone\.fpn\.inner_blocks\.\d\.1\.": "a detector of torchvision's second version (..._v2), with batch norms in its FPN",
    r"roi_heads\.box_predictor\.\d\.": "a Cascade R-CNN, with several second stages",
    r"backbone\.body\.\d": "a detector of torchvision on another backbone than a ResNet",
}
_OTHER_BACKBONE = "which is not read; set backbone=timm/NAME to use timm's network of this kind, with timm's weights"
_BLOCK = re.compile(r"(\d+)\.(conv\d|shortcut)\.(norm\.)?(\w+)")
_CAFFE2_NAME = re.compile(r"(?:conv1|res_conv1|res(\d)_(\d+)_branch(1|2a|2b|2c))_(bn_)?(\w+)")
_CAFFE2_LEAVES = {"w": "weight", "s": "weight", "b": "bias", "rm": "running_mean", "riv": "running_var"}
_CAFFE2_LAYERS = {"1": "shortcut", "2a": "conv1", "2b": "conv2", "2c": "conv3"}


def recognise(names: Iterable[str]) -> str | None:
    """Return the kind of network that a file with tensors of these names holds, such as TORCHVISION; None: unknown."""
    signs = {
        OURS: (STAGE,),
        FCOS: ("head.regression_head.bbox_ctrness.",),
        RETINANET: ("head.regression_head.bbox_reg.",),
        TORCHVISION: ("backbone.body.", "backbone.fpn."),
        DETECTRON2: ("backbone.bottom_up.", "backbone.stem.", "backbone.res", "proposal_generator.", "stem.conv1.", "res2."),
        OUR_BACKBONE: ("stages.stem.",),
        CAFFE2: ("conv1_w", "res2_0_", "res_conv1_"),
        RESNET: ("conv1.weight", "layer1."),
        MOBILENET: ("features.1.conv.",),  # other networks of torchvision have features.0 too
    }
    names = list(names)
    return next((kind for kind, starts in signs.items() if any(name.startswith(starts) for name in names)), None)


def other_detector(names: Iterable[str]) -> str | None:
    """Describe the detector that has tensors of these names, if it is one that is not read."""
    names = list(names)
    kinds = (kind for pattern, kind in _OTHER_DETECTORS.items() if any(re.match(pattern, name) for name in names))
    return next((f"{kind}, which is not read" for kind in kinds), None)


def other_backbone(kind: str | None, tensors: Mapping[str, Tensor]) -> str | None:
    """Describe the backbone of a file of `kind`, if it is one that is not read.

    Args:
        tensors: under our names, if `kind` is known.
    """
    if kind is None and any(re.match(r"features\.\d", name) for name in tensors):
        return f"a network of torchvision's other than ResNets and MobileNetV2, {_OTHER_BACKBONE}"
    widths = [tensors.get(f"{STAGE}c2.0.conv{n}.weight") for n in (1, 2, 3)]
    if kind in (None, OURS, OUR_BACKBONE) or any(width is None or width.dim() != 4 for width in widths):
        return None
    (first, _), (outputs, inputs), (last, _) = (width.shape[:2] for width in widths)
    if inputs < outputs:
        return f"a ResNeXt (its convolutions have {outputs // max(inputs, 1)} groups), {_OTHER_BACKBONE}"
    return f"a wide ResNet, {_OTHER_BACKBONE}" if 2 * first == last else None


def is_ignored(kind: str, name: str) -> bool:
    """Return whether our detectors do not need this tensor of `kind`."""
    return kind in _IGNORED and re.match(_IGNORED[kind], name) is not None


def to_ours(kind: str, name: str) -> str | None:
    """Return our name of the tensor that `kind` calls `name`; None: we have no such tensor."""
    return _TO_OURS[kind](name)


def _resnet(name: str) -> str | None:
    first, _, rest = name.partition(".")
    return f"{STAGE}{_RESNET[first]}.{rest}" if first in _RESNET and rest else None


def _mobilenet(name: str) -> str | None:
    _, _, rest = name.partition("features.")
    number = rest.partition(".")[0]
    stage = next((s for s, (a, b) in MOBILENET_CUTS.items() if number.isdecimal() and a <= int(number) < b), None)
    return f"{STAGE}{stage}.{rest}" if stage and name == f"features.{rest}" else None


def _torchvision(name: str) -> str | None:
    if name.startswith("backbone.body."):
        return _resnet(name.removeprefix("backbone.body."))
    return _layer(name, _TORCHVISION) or _layer(name, _TORCHVISION_OLD)


def _one_stage(layers: dict[str, str], name: str) -> str | None:
    if name.startswith("backbone.body."):
        return _resnet(name.removeprefix("backbone.body."))
    return _layer(name, layers)


def _detectron2(name: str) -> str | None:
    if translated := _layer(name, _DETECTRON2):
        return translated
    if name.startswith("roi_heads.res5."):
        return _block(CONV5, name.removeprefix("roi_heads.res5."))
    name = name.removeprefix("backbone.").removeprefix("bottom_up.")
    if name.startswith("stem.conv1."):
        norm, leaf = re.fullmatch(r"stem\.conv1\.(norm\.)?(.+)", name).groups()
        return f"{STAGE}stem.{1 if norm else 0}.{leaf}"
    stage = re.fullmatch(r"res([2-5])\.(.+)", name)
    return _block(f"{STAGE}c{stage[1]}.", stage[2]) if stage else None


def _caffe2(name: str) -> str | None:
    """Translate by way of detectron2's name."""
    match = _CAFFE2_NAME.fullmatch(name)
    if not match or match[5] not in _CAFFE2_LEAVES:
        return None
    stage, block, branch, norm, leaf = match.groups()
    layer = f"res{stage}.{block}.{_CAFFE2_LAYERS[branch]}" if stage else "stem.conv1"
    return _detectron2(f"{layer}.{'norm.' if norm else ''}{_CAFFE2_LEAVES[leaf]}")


def _layer(name: str, layers: dict[str, str]) -> str | None:
    layer, _, leaf = name.rpartition(".")
    return f"{layers[layer]}.{leaf}" if layer in layers else None


def _block(stage: str, name: str) -> str | None:
    """Translate detectron2's "0.conv1.norm.weight" to "0.bn1.weight", and "0.shortcut." to "0.downsample."."""
    match = _BLOCK.fullmatch(name)
    if not match:
        return None
    number, layer, norm, leaf = match.groups()
    if layer == "shortcut":
        return f"{stage}{number}.downsample.{1 if norm else 0}.{leaf}"
    return f"{stage}{number}.{layer.replace('conv', 'bn') if norm else layer}.{leaf}"


_TO_OURS: dict[str, Callable[[str], str | None]] = {
    OURS: lambda name: name,
    OUR_BACKBONE: lambda name: f"backbone.{name}",
    TORCHVISION: _torchvision,
    RETINANET: partial(_one_stage, _RETINANET),
    FCOS: partial(_one_stage, _FCOS),
    DETECTRON2: _detectron2,
    CAFFE2: _caffe2,
    RESNET: _resnet,
    MOBILENET: _mobilenet,
}


def to_torchvision(kind: str, name: str) -> str | None:
    """Return torchvision's name of our tensor `name`, the inverse of `to_ours`; None: `kind` has no such tensor."""
    if kind == MOBILENET:
        candidate = f"features.{name.removeprefix(STAGE).partition('.')[2]}"
        return candidate if _mobilenet(candidate) == name else None
    for layer, stage in _RESNET.items():
        if name.startswith(f"{STAGE}{stage}."):
            short = f"{layer}.{name.removeprefix(f'{STAGE}{stage}.')}"
            return short if kind == RESNET else f"backbone.body.{short}"
    inverse = {ours: theirs for theirs, ours in _TORCHVISION.items()}
    return _layer(name, inverse) if kind == TORCHVISION else None

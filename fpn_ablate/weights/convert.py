"""Convert the tensors of a file to those of our detector: names, rows of classes, order and scale of colours.

detectron2's models read BGR in 0..255, minus a mean, divided by a standard deviation; ours read RGB in 0..1, normalised
(`model.detectors.two_stage.normalise`). The means are equal, so that scaling the first convolution corrects the difference
exactly.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fpn_ablate.model.backbones.base import STD
from fpn_ablate.utils.errors import UserError
from fpn_ablate.weights import names
from fpn_ablate.weights.files import Stored

SUFFIX = ".safetensors"  # of what import writes
ZOO = "Detectron2 Model Zoo"  # author of detectors on ResNets of Caffe, which read BGR divided by 1
BN_EPS = 1e-5  # of all our batch norms; torch's default
STEM = f"{names.STAGE}stem.0.weight"
DENSE_SCORES, DENSE_DELTAS, DENSE_DISTANCES = "head.scores", "head.deltas", "head.distances"
SCORES, DELTAS, MASKS = "roi.predictor.scores", "roi.predictor.deltas", f"{names.MASK}head.logits"
# COCO numbers its categories 1..90 and uses 80 of the numbers; torchvision's detectors have a row for every number.
COCO_ROWS = 91
COCO_UNUSED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
_LEAVES = ("weight", "bias")
RATIOS = 3  # of the anchors of torchvision's RetinaNet
P6 = "neck.p6_conv.p6.weight"
# The configuration of torchvision's detectors, which their weights do not reveal completely.
_NECK = {
    **{"name": "fpn", "top_down": True, "lateral": True, "output": "pyramid"},
    **{"upsample": "nearest", "fuse": "sum", "norm": "none", "smooth": "all", "p6": "subsample", "levels": "p2-p6"},
}
_HEADS = {"rpn.relu": True, "task.roi.levels": "assigned"}


@dataclass(frozen=True)
class Options:
    """Facts that a file of weights does not contain.

    Attributes:
        bn_eps: the eps of its batch norms. torchvision's released COCO_V1 detectors: 0.
        pixel_std: detectron2's PIXEL_STD in the order of its colours; by default 1 for its model zoo, torchvision's for ResNets
            converted from torchvision, and refused for other authors.
        rgb: it reads RGB; by default BGR, except for ResNets converted from torchvision.
        keep_classes: keep all 91 rows of a COCO detector of torchvision instead of the 80 that have a category.
    """

    bn_eps: float = BN_EPS
    pixel_std: tuple[float, float, float] | None = None
    rgb: bool | None = None
    keep_classes: bool = False


@dataclass
class Weights:
    """The tensors of a file under our names.

    Attributes:
        source: the kind of the file (`names.recognise`).
        unknown: its tensors without a counterpart, by the file's names.
        facts: properties of the network, as text: backbone, row, num_classes, stride_in_1x1, neck.
        notes: sentences for the user.
    """

    path: Path
    source: str
    tensors: dict[str, Tensor]
    unknown: dict[str, Tensor]
    facts: dict[str, str]
    notes: list[str]


def convert(stored: Stored, options: Options | None = None, backbone_only: bool = False) -> Weights:
    """Convert a file's tensors to our names and values.

    Args:
        backbone_only: drop the other tensors, and notes about them.

    Raises:
        UserError: the format is unknown, `options` do not apply to it or lack what it does not say, or its predictor has box
            deltas that classes share.
    """
    options = options or Options()
    source = names.recognise(stored.tensors)
    if source is None:
        first = f"{len(stored.tensors)} tensors: {', '.join(sorted(stored.tensors)[:3])} ..."
        network = names.other_detector(stored.tensors) or names.other_backbone(None, stored.tensors)
        raise UserError(
            f"{stored.path}: {network or 'unknown names of weights'} ({first}). Supported are detectors of fpn_ablate, "
            "torchvision (fasterrcnn_..._fpn, retinanet_..._fpn, fcos_..._fpn) and detectron2, and the ResNets, MobileNets, "
            "VGG-16 and ConvNeXt-T of torchvision"
        )
    _refuse_options(stored, source, options)
    weights = _rename(stored, source)
    if backbone_only:
        weights.tensors = {n: v for n, v in weights.tensors.items() if n.startswith((names.STAGE, names.CONV5))}
        weights.notes = list(stored.notes)
    if source == names.TORCHVISION:
        _convert_torchvision_classes(weights, options)
    if source in (names.RETINANET, names.FCOS):
        _convert_one_stage_rows(weights, options)
    if source in (names.DETECTRON2, names.CAFFE2):
        _add_statistics(weights.tensors)
        _convert_detectron2_classes(weights)
        _convert_colours(weights, options, from_torchvision=stored.facts.get("author") == "torchvision")
    if options.bn_eps != BN_EPS:
        _convert_eps(weights, options.bn_eps)
    elif source in (names.TORCHVISION, names.RETINANET):
        weights.notes.append("for torchvision's own COCO_V1 detectors, whose batch norms have no eps, use import --bn-eps 0")
    if (scores := weights.tensors.get(f"{SCORES}.weight")) is not None:
        weights.facts["num_classes"] = str(len(scores) - 1)
    return weights


def _refuse_options(stored: Stored, source: str, options: Options) -> None:
    if source in (names.OURS, names.OUR_BACKBONE) and replace(options, keep_classes=False) != Options():
        raise UserError(
            f"{stored.path}: a file of this project; --bn-eps, --pixel-std and --rgb are for files of other programs"
        )
    if source not in (names.DETECTRON2, names.CAFFE2) and (options.pixel_std is not None or options.rgb is not None):
        raise UserError(f"{stored.path}: a file of {source}; --pixel-std and --rgb are for files of detectron2")
    author = stored.facts.get("author", "")
    by = f" by {author[:40]}" if author else ""
    if source == names.DETECTRON2 and author not in ("torchvision", ZOO) and options.pixel_std is None:
        kind, usual = "detector", "Those trained from the model zoo's R50 and R101: --pixel-std 1"
        if _is_backbone(stored):
            kind, usual = "ResNet", "MoCo's and most other self-supervised ResNets: --rgb --pixel-std 58.395,57.12,57.375"
        raise UserError(
            f"{stored.path}: a {kind} for detectron2{by}, which does not say its colours and strides; run "
            f"`python -m fpn_ablate weights import FILE OUT{SUFFIX} --pixel-std STD` with the PIXEL_STD of its configuration, "
            f"and --rgb if its INPUT.FORMAT is RGB. {usual}"
        )


def _is_backbone(stored: Stored) -> bool:
    """Return whether a file in detectron2's names has none of a detector's other parts."""
    parts = ("backbone.fpn_", "proposal_generator.", "roi_heads.", "head.")
    return not any(name.startswith(parts) for name in stored.tensors)


def _rename(stored: Stored, source: str) -> Weights:
    weights = Weights(stored.path, source, {}, {}, dict(stored.facts) if source == names.OURS else {}, list(stored.notes))
    ignored = set()
    for name, value in stored.tensors.items():
        our_name = names.to_ours(source, name)
        if our_name is None and names.is_ignored(source, name):
            ignored.add(".".join(name.split(".")[:2]))
        elif our_name is None:
            weights.unknown[name] = value
        elif our_name in weights.tensors:
            raise UserError(f"{stored.path}: {name} and another tensor are both {our_name}")
        else:
            weights.tensors[our_name] = value
    heads = [part for part in sorted(ignored) if "keypoint" in part or "mask" in part]
    weights.notes += [f"left out: {part}, which our detectors do not have" for part in heads]
    weights.facts.setdefault("source", source)
    if source in (names.TORCHVISION, names.RETINANET, names.FCOS, names.RESNET):
        weights.facts["stride_in_1x1"] = "false"
    if source not in (names.OURS, names.OUR_BACKBONE):  # its depth is known to who loads it
        weights.facts["backbone"] = names.SLICED[source][0] if source in names.SLICED else "resnet"
    return weights


def _convert_torchvision_classes(weights: Weights, options: Options) -> None:
    """Remove deltas and masks of background, which nothing trains or reads, and the rows of numbers that are no category."""
    rows = _rows(weights, background=1)
    if rows is None:
        return
    keep = list(range(rows))
    if rows == COCO_ROWS and not options.keep_classes:
        keep = [row for row in keep if row not in COCO_UNUSED]
        unused = ", ".join(map(str, COCO_UNUSED))
        weights.notes.append(
            f"91 rows of classes: background and COCO's 80 categories are kept, {unused} left out (--keep-classes)"
        )
    for leaf in ("weight", "bias"):
        scores, deltas = weights.tensors[f"{SCORES}.{leaf}"], weights.tensors[f"{DELTAS}.{leaf}"]
        weights.tensors[f"{SCORES}.{leaf}"] = scores[keep]
        weights.tensors[f"{DELTAS}.{leaf}"] = deltas.unflatten(0, (rows, 4))[keep[1:]].flatten(0, 1)
        if (masks := weights.tensors.get(f"{MASKS}.{leaf}")) is not None:
            if masks.shape[:1] != (rows,):
                raise UserError(f"{weights.path}: its masks are of {tuple(masks.shape)[:1]} classes, and its scores of {rows}")
            weights.tensors[f"{MASKS}.{leaf}"] = masks[keep[1:]]


def _convert_one_stage_rows(weights: Weights, options: Options) -> None:
    """Order the anchors of a cell size by size, as ours are, not ratio by ratio; remove rows of numbers that are no category.

    FCOS has one place a cell, in place of anchors.

    Raises:
        UserError: scores and deltas do not have rows of the same anchors.
    """
    boxes = DENSE_DISTANCES if weights.source == names.FCOS else DENSE_DELTAS
    rows = {name: weights.tensors.get(f"{name}.bias", torch.empty(0)).numel() for name in (DENSE_SCORES, boxes)}
    anchors = rows[boxes] // 4
    classes = rows[DENSE_SCORES] // max(anchors, 1)
    layers = {f"{name}.{leaf}": anchors * n for name, n in ((DENSE_SCORES, classes), (boxes, 4)) for leaf in _LEAVES}
    actual = {name: weights.tensors[name].shape[:1].numel() for name in layers if name in weights.tensors}
    if actual != layers or classes < 2:
        raise UserError(f"{weights.path}: its head has the wrong rows: {actual}, and not those of one set of anchors")
    ratios = RATIOS if anchors % RATIOS == 0 else 1
    keep = list(range(1, classes))  # nothing is labelled as background
    if classes == COCO_ROWS and not options.keep_classes:
        keep = [row for row in keep if row not in COCO_UNUSED]
        weights.notes.append("91 rows of classes: COCO's 80 categories are kept (--keep-classes)")
    for name in layers:
        by_ratio = weights.tensors[name].unflatten(0, (ratios, anchors // ratios, -1))
        by_size = by_ratio.transpose(0, 1)
        weights.tensors[name] = (by_size[:, :, keep] if name.startswith(DENSE_SCORES) else by_size).flatten(0, 2)
    weights.facts["num_classes"] = str(len(keep))
    p6 = weights.tensors.get(P6)
    on_p5 = p6 is not None and p6.dim() == 4 and len(p6) == p6.shape[1]
    norm = " task.norm=gn" if any(".class_subnet.0.1." in name for name in weights.tensors) else ""
    keys = f"neck.levels=p3-p7 neck.p6={'conv' if on_p5 else 'conv_c5'}{norm}"
    row = {(True, ""): "torchvision", (False, " task.norm=gn"): "torchvision_v2"}.get((on_p5, norm))
    keys = f"ablation=retinanet/{row} ({keys})" if row else f"task=retinanet {keys}"
    weights.notes.append(f"use it with {'ablation=fcos/torchvision' if weights.source == names.FCOS else keys}")


def _convert_detectron2_classes(weights: Weights) -> None:
    """Move the scores of background from the last row to the first."""
    if _rows(weights, background=0) is not None:
        for leaf in ("weight", "bias"):
            weights.tensors[f"{SCORES}.{leaf}"] = weights.tensors[f"{SCORES}.{leaf}"].roll(1, 0)


def _rows(weights: Weights, background: int) -> int | None:
    """Return the number of rows of the class scores, background included; None: the predictor is missing or incomplete.

    Raises:
        UserError: scores and box deltas do not match.
    """
    parts = [weights.tensors.get(f"{layer}.{leaf}") for layer in (SCORES, DELTAS) for leaf in ("weight", "bias")]
    if any(part is None for part in parts):
        return None
    counts = [len(part) if part.dim() else 0 for part in parts]
    rows = counts[0]
    deltas = 4 * (rows - 1 + background)
    if counts != [rows, rows, deltas, deltas] or rows < 2:
        shape = "scores {} and {}, deltas {} and {}".format(*counts)
        raise UserError(
            f"{weights.path}: its predictor has the wrong rows ({shape}; {rows} scores need {deltas} deltas); "
            "each class must have its own box deltas"
        )
    return rows


def _add_statistics(tensors: dict[str, Tensor]) -> None:
    """Add the statistics of batch norms that old files merged into weight and bias: mean 0, and variance 1 including eps."""
    if any(".running_" in name for name in tensors):
        return
    for name, value in list(tensors.items()):
        layer, _, leaf = name.rpartition(".")
        if leaf == "weight" and value.dim() == 1:
            tensors[f"{layer}.running_mean"] = torch.zeros_like(value)
            tensors[f"{layer}.running_var"] = torch.ones_like(value) - BN_EPS


def _convert_colours(weights: Weights, options: Options, from_torchvision: bool) -> None:
    """Scale the first convolution to our input, and note what else the configuration must set.

    Args:
        from_torchvision: detectron2's converter made the file from a ResNet of torchvision.
    """
    rgb = from_torchvision if options.rgb is None else options.rgb
    std = [255 * value for value in STD] if from_torchvision else [1.0] * 3  # in RGB
    if options.pixel_std is not None:
        std = list(options.pixel_std if rgb else options.pixel_std[::-1])
    # Bottlenecks that divide by 1 came from Caffe with its strides; detectron2's other models have torchvision's strides.
    caffe = std == [1.0] * 3 and any(".conv3." in name for name in weights.tensors)
    strides = weights.facts["stride_in_1x1"] = str(caffe).lower()
    weights.notes.append(f"colours: {'RGB' if rgb else 'BGR'}, divided by {', '.join(f'{v:g}' for v in std)} (R, G, B)")
    second_stage = f"{SCORES}.weight" in weights.tensors
    pooling = " task.roi.pooling=align_v2 task.roi.sampling_ratio=0" if second_stage else ""
    weights.notes.append(f"use it with backbone.stride_in_1x1={strides}{pooling}")
    stem = weights.tensors.get(STEM)
    if stem is not None and stem.dim() == 4 and stem.shape[1] == 3:
        scale = stem.new_tensor([255 * a / b for a, b in zip(STD, std, strict=True)], dtype=torch.float64)
        weights.tensors[STEM] = ((stem if rgb else stem.flip(1)).double() * scale[:, None, None]).to(stem.dtype)


def _convert_eps(weights: Weights, eps: float) -> None:
    """Change the scales of batch norms so that they compute with BN_EPS what they computed with `eps`.

    Changing the variances instead would lose the smallest ones.
    """
    for name, value in weights.tensors.items():
        scale = name.removesuffix("running_var") + "weight"
        if name.endswith(".running_var") and scale in weights.tensors:
            variance = value.double()
            ratio = ((variance + BN_EPS) / (variance + eps)).sqrt()
            weights.tensors[scale] = (weights.tensors[scale].double() * ratio).to(value.dtype)
    weights.notes.append(f"scales of batch norms converted from eps {eps:g} to {BN_EPS:g}")


def backbone_part(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the backbone's tensors, named as in `Backbone` (stages.c2...), including conv5 where it is the box head."""
    stages = {n.removeprefix("backbone."): v for n, v in tensors.items() if n.startswith(names.STAGE)}
    return stages | {f"stages.c5.{n.removeprefix(names.CONV5)}": v for n, v in tensors.items() if n.startswith(names.CONV5)}


def to_torchvision(weights: Weights) -> dict[str, Tensor]:
    """Return a state dict for torchvision: of FasterRCNN or MaskRCNN with resnet_fpn_backbone, or of a backbone without
    classifier.

    Ours has no box deltas and no mask of background; they are filled with 0.

    Raises:
        UserError: torchvision has no such network.
    """
    path, backbone = weights.path, weights.facts.get("backbone")
    alone = all(name.startswith(names.STAGE) for name in weights.tensors)
    if weights.facts.get("stride_in_1x1") == "true":
        raise UserError(
            f"{path}: its strides in the 1x1 convolutions do not fit torchvision's ResNets, which have them in the 3x3"
        )
    if backbone is None:
        raise UserError(f"{path} does not say what its backbone is; give the run's folder, or a file that export wrote")
    sliced = {network: kind for kind, (network, _) in names.SLICED.items()}
    if not backbone.startswith(("resnet", "resnext")) and not (alone and backbone in sliced):
        raise UserError(f"{path}: torchvision has no {'backbone' if alone else 'such detector on'} {backbone}")
    neck = _NECK | json.loads(weights.facts.get("neck", "{}"))
    if required := [f"neck.{key}={value}" for key, value in _NECK.items() if neck[key] != value]:
        raise UserError(f"{path}: torchvision only has a pyramid with {', '.join(required)}")
    settings = _HEADS | json.loads(weights.facts.get("settings", "{}"))
    if required := [f"{key}={value}" for key, value in _HEADS.items() if settings[key] != value]:
        raise UserError(f"{path}: torchvision only has heads with {', '.join(required)}")
    kind = names.TORCHVISION
    if alone:
        kind = sliced.get(backbone, names.RESNET)
    out = {}
    for name, value in weights.tensors.items():
        their_name = names.to_torchvision(kind, name)
        if their_name is None:
            raise UserError(f"{path}: {name} has no counterpart in torchvision's {kind.removeprefix('torchvision ')}")
        if name.startswith(MASKS) and [str(n) for n in value.shape[:1]] != [weights.facts.get("num_classes")]:
            raise UserError(f"{path}: torchvision has a mask for each class: task.mask.class_agnostic=false")
        background = {DELTAS: 4, MASKS: 1}.get(name.rpartition(".")[0], 0) if kind == names.TORCHVISION else 0
        out[their_name] = torch.cat([value.new_zeros(background, *value.shape[1:]), value]) if background else value
    return out

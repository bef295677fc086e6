"""From the tensors of a file to those of our detector: names, rows of classes, the order and scale of colours.

detectron2's models read BGR in 0..255 less the mean, divided by a deviation; ours RGB in 0..1, normalised (`model.detector`).
The means are the same, so the first convolution takes up the difference without a remainder.
"""

import json
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fpn_ablate.model.detectors.two_stage import STD
from fpn_ablate.utils.errors import UserError
from fpn_ablate.weights import names
from fpn_ablate.weights.files import Stored
from fpn_ablate.weights.names import CAFFE2, CONV5, DETECTRON2, OUR_BACKBONE, OURS, STAGE, TORCHVISION

BN_EPS = 1e-5  # of every batch norm of ours, as torch's default
STEM = f"{STAGE}stem.0.weight"
SCORES, DELTAS = "roi.predictor.scores", "roi.predictor.deltas"
# COCO numbers its categories 1..90 and uses 80 of the numbers; torchvision's detectors have a row for every number.
COCO_ROWS = 91
COCO_UNUSED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
# What torchvision's pyramid is; weights alone do not tell all of it.
_NECK = {
    **{"name": "fpn", "top_down": True, "lateral": True, "output": "pyramid"},
    **{"upsample": "nearest", "smooth": "all", "p6": "subsample"},
}


@dataclass(frozen=True)
class Options:
    """What a file does not say of itself.

    Attributes:
        bn_eps: what its batch norms add to the variance. torchvision's released COCO_V1 detectors: 0.
        pixel_std: detectron2's PIXEL_STD in the order of its colours; by default 1, or torchvision's for ResNets taken from
            there.
        rgb: its colours are RGB; by default BGR, but for ResNets taken from torchvision.
        keep_classes: keep all 91 rows of a COCO detector of torchvision instead of the 80 that have a category.
    """

    bn_eps: float = BN_EPS
    pixel_std: tuple[float, float, float] | None = None
    rgb: bool | None = None
    keep_classes: bool = False


@dataclass(frozen=True)
class Weights:
    """Tensors under our names.

    Attributes:
        source: who wrote the file (`names.recognise`).
        unknown: names in it that have no counterpart, as the file has them.
        facts: what is known of the network: backbone, row, num_classes, stride_in_1x1, neck; text to text.
        notes: sentences for the user.
    """

    stored: Stored
    source: str
    tensors: dict[str, Tensor]
    unknown: list[str]
    facts: dict[str, str]
    notes: list[str] = field(default_factory=list)


def convert(stored: Stored, options: Options | None = None) -> Weights:
    """A file's tensors as our detector has them.

    Raises:
        UserError: nobody known here wrote it, `options` do not belong to it, or its predictor is of another kind.
    """
    options = options or Options()
    source = names.recognise(stored.tensors)
    if source is None:
        first = ", ".join(sorted(stored.tensors)[:3])
        raise UserError(
            f"{stored.path}: no weights that are known here ({len(stored.tensors)} tensors: {first} ...); known are detectors "
            "of fpn_ablate, torchvision (fasterrcnn_..._fpn) and detectron2, and the ResNets and MobileNetV2 of torchvision"
        )
    _refuse_options(stored, source, options)
    weights = _rename(stored, source)
    if source == TORCHVISION:
        weights = _torchvision_rows(weights, options)
    if source in (DETECTRON2, CAFFE2):
        weights = _detectron2_colours(_detectron2_rows(_statistics(weights)), options)
    if options.bn_eps != BN_EPS:
        weights = _other_eps(weights, options.bn_eps)
    elif source == TORCHVISION:
        weights.notes.append("a COCO_V1 file of torchvision's own has batch norms without eps: it wants import --bn-eps 0")
    if (scores := weights.tensors.get(f"{SCORES}.weight")) is not None:
        weights.facts["num_classes"] = str(len(scores) - 1)
    return weights


def _refuse_options(stored: Stored, source: str, options: Options) -> None:
    if source in (OURS, OUR_BACKBONE) and replace(options, keep_classes=False) != Options():
        raise UserError(
            f"{stored.path}: a file of this project; options on what other programs leave unsaid do not belong to it"
        )
    if source not in (DETECTRON2, CAFFE2) and (options.pixel_std is not None or options.rgb is not None):
        raise UserError(f"{stored.path}: a file of {source}; colours (--pixel-std, --rgb) are to be told of detectron2's alone")


def _rename(stored: Stored, source: str) -> Weights:
    tensors: dict[str, Tensor] = {}
    unknown, left = [], set()
    for name, value in stored.tensors.items():
        if names.beside(source, name):
            left.add(".".join(name.split(".")[:2]))
            continue
        ours = names.to_ours(source, name)
        if ours is None:
            unknown.append(name)
        elif ours in tensors:
            raise UserError(f"{stored.path}: {name} and another tensor are both {ours}")
        else:
            tensors[ours] = value
    facts = dict(stored.facts) if source == OURS else {}
    notes = [f"left out: {part}, which a box detector lacks" for part in sorted(left) if "mask" in part or "keypoint" in part]
    return Weights(stored, source, tensors, unknown, {**facts, "source": facts.get("source", source)}, notes)


def _torchvision_rows(weights: Weights, options: Options) -> Weights:
    """Without the box deltas of background, which nothing trains or reads, and without numbers that are no category."""
    tensors, notes = dict(weights.tensors), list(weights.notes)
    rows = _rows(weights, background=1)
    if rows is None:
        return weights
    keep = list(range(rows))
    if rows == COCO_ROWS and not options.keep_classes:
        keep = [row for row in keep if row not in COCO_UNUSED]
        unused = ", ".join(map(str, COCO_UNUSED))
        notes.append(f"91 rows of classes: kept are background and COCO's 80 categories, left out {unused} (--keep-classes)")
    for leaf in ("weight", "bias"):
        tensors[f"{SCORES}.{leaf}"] = tensors[f"{SCORES}.{leaf}"][keep]
        tensors[f"{DELTAS}.{leaf}"] = tensors[f"{DELTAS}.{leaf}"].unflatten(0, (rows, 4))[keep[1:]].flatten(0, 1)
    return replace(weights, tensors=tensors, notes=notes)


def _detectron2_rows(weights: Weights) -> Weights:
    """Background first instead of last."""
    tensors = dict(weights.tensors)
    if _rows(weights, background=0) is None:
        return weights
    for leaf in ("weight", "bias"):
        tensors[f"{SCORES}.{leaf}"] = tensors[f"{SCORES}.{leaf}"].roll(1, 0)
    return replace(weights, tensors=tensors)


def _rows(weights: Weights, background: int) -> int | None:
    """Rows of the class scores, where both parts of the predictor are whole and fit; None: some are missing."""
    parts = [weights.tensors.get(f"{layer}.{leaf}") for layer in (SCORES, DELTAS) for leaf in ("weight", "bias")]
    if any(part is None for part in parts):
        return None
    counts = [len(part) if part.dim() else 0 for part in parts]
    rows = counts[0]
    wanted = 4 * (rows - 1 + background)
    if counts != [rows, rows, wanted, wanted] or rows < 2:
        found = "scores {} and {}, deltas {} and {}".format(*counts)
        raise UserError(
            f"{weights.stored.path}: its predictor has rows of another kind ({found}; {rows} scores go with {wanted} deltas); "
            "box deltas must be a class's own"
        )
    return rows


def _statistics(weights: Weights) -> Weights:
    """Old files have put the statistics of their batch norms into weight and bias: mean 0 and variance 1, eps included."""
    if any(".running_" in name for name in weights.tensors):
        return weights
    tensors = dict(weights.tensors)
    for name, value in weights.tensors.items():
        layer, _, leaf = name.rpartition(".")
        if leaf == "weight" and value.dim() == 1:
            tensors[f"{layer}.running_mean"] = torch.zeros_like(value)
            tensors[f"{layer}.running_var"] = torch.ones_like(value) - BN_EPS
    return replace(weights, tensors=tensors)


def _detectron2_colours(weights: Weights, options: Options) -> Weights:
    own = weights.stored.facts.get("author") == "torchvision"  # detectron2's converter of torchvision's ResNets writes this
    rgb = own if options.rgb is None else options.rgb
    theirs = [255 * value for value in STD] if own else [1.0] * 3  # in RGB
    if options.pixel_std is not None:
        theirs = list(options.pixel_std if rgb else options.pixel_std[::-1])
    # What divides by 1 came from Caffe with its strides; detectron2's other models, and basic blocks, have torchvision's.
    caffe = theirs == [1.0] * 3 and any(".conv3." in name for name in weights.tensors)
    facts = {**weights.facts, "stride_in_1x1": str(caffe).lower()}
    notes = [*weights.notes, f"colours: {'RGB' if rgb else 'BGR'}, divided by {', '.join(f'{v:g}' for v in theirs)} (R, G, B)"]
    pooling = (
        " task.roi.pooling=align_v2 task.roi.sampling_ratio=0"
        if any(name.startswith("roi.") for name in weights.tensors)
        else ""
    )
    notes.append(f"use it with backbone.stride_in_1x1={facts['stride_in_1x1']}{pooling}")
    tensors = dict(weights.tensors)
    stem = tensors.get(STEM)
    if stem is not None and stem.dim() == 4 and stem.shape[1] == 3:
        scale = stem.new_tensor([255 * a / b for a, b in zip(STD, theirs, strict=True)], dtype=torch.float64)
        tensors[STEM] = ((stem if rgb else stem.flip(1)).double() * scale[:, None, None]).to(stem.dtype)
    return replace(weights, tensors=tensors, facts=facts, notes=notes)


def _other_eps(weights: Weights, eps: float) -> Weights:
    """Scales with which batch norms compute what they did with `eps`. Not by other variances: the smallest would vanish."""
    tensors = dict(weights.tensors)
    for name, value in weights.tensors.items():
        if name.endswith(".running_var"):
            scale, variance = name.removesuffix("running_var") + "weight", value.double()
            ratio = ((variance + BN_EPS) / (variance + eps)).sqrt()
            tensors[scale] = (tensors[scale].double() * ratio).to(value.dtype)
    return replace(
        weights, tensors=tensors, notes=[*weights.notes, f"scales of batch norms moved from eps {eps:g} to {BN_EPS:g}"]
    )


def backbone_part(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's, named as in `Backbone`: stages.c2...; conv5 as well where it is the second stage's head."""
    found = {n.removeprefix("backbone."): v for n, v in tensors.items() if n.startswith(STAGE)}
    return found | {f"stages.c5.{n.removeprefix(CONV5)}": v for n, v in tensors.items() if n.startswith(CONV5)}


def to_torchvision(weights: Weights) -> dict[str, Tensor]:
    """A state dict for torchvision: of FasterRCNN with resnet_fpn_backbone, or of a backbone alone without its classifier.

    Box deltas of background, which ours lacks, are 0.

    Raises:
        UserError: torchvision has no such network.
    """
    tensors, path = weights.tensors, weights.stored.path
    if weights.facts.get("stride_in_1x1") == "true":
        raise UserError(f"{path}: it has its strides in the 1x1 convolutions, torchvision's ResNets in the 3x3")
    backbone = weights.facts.get("backbone", "resnet")
    alone = all(name.startswith(STAGE) for name in tensors)
    if not backbone.startswith("resnet") and not (alone and backbone == "mobilenet_v2"):
        raise UserError(f"{path}: torchvision has no {'backbone' if alone else 'such detector on'} {backbone}")
    try:
        neck = {**_NECK, **json.loads(weights.facts.get("neck", "{}"))}
    except (ValueError, TypeError):
        raise UserError(f"{path}: what its header says of the neck cannot be read; export it anew") from None
    if other := [f"neck.{key}={value}" for key, value in _NECK.items() if neck[key] != value]:
        raise UserError(f"{path}: torchvision has a pyramid with {', '.join(other)} alone")
    kind = TORCHVISION
    if alone:
        kind = names.MOBILENET if backbone == "mobilenet_v2" else names.RESNET
    out = {}
    for name, value in tensors.items():
        theirs = names.to_torchvision(kind, name)
        if theirs is None:
            raise UserError(f"{path}: {name} has no counterpart in torchvision's {kind.removeprefix('torchvision ')}")
        background = kind == TORCHVISION and name.startswith(DELTAS)
        out[theirs] = torch.cat([value.new_zeros(4, *value.shape[1:]), value]) if background else value
    return out

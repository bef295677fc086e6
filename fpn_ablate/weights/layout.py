"""Infer the network that a set of tensors belongs to, and list missing, unexpected and mis-shaped tensors."""

from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Size, Tensor, nn

from fpn_ablate.config import parts
from fpn_ablate.model.backbones.base import STAGES, Backbone
from fpn_ablate.model.heads.box_head import Predictor, TwoFC
from fpn_ablate.model.heads.rpn import RPNHead
from fpn_ablate.model.necks.fpn import FPN
from fpn_ablate.model.parts import BACKBONES
from fpn_ablate.weights.convert import DELTAS, SCORES, backbone_part
from fpn_ablate.weights.names import CONV5, STAGE

Shapes = dict[str, Size]
LISTED = 10  # names of a kind in a message
COUNTER = "num_batches_tracked"  # of trained batch norms; frozen ones and torch before 0.4.1 lack it, and nothing needs it


def shapes_of(tensors: Mapping[str, Tensor], prefix: str = "") -> Shapes:
    """Return the shape of each tensor, by its name with `prefix`."""
    return {prefix + name: value.shape for name, value in tensors.items()}


def misfit(expected: Shapes, actual: Shapes) -> str | None:
    """List missing, unexpected and mis-shaped tensors, up to ten names of each; None: all fit. Batch counters are ignored."""
    expected, actual = ({n: s for n, s in shapes.items() if not n.endswith(COUNTER)} for shapes in (expected, actual))
    kinds = {
        "missing": [name for name in expected if name not in actual],
        "unexpected": [name for name in actual if name not in expected],
        "of another shape": [
            f"{name} {tuple(actual[name])} for {tuple(shape)}"
            for name, shape in expected.items()
            if actual.get(name, shape) != shape
        ],
    }
    parts = [
        f"{len(names)} tensor{'s are' if len(names) > 1 else ' is'} {kind} ({_list(names)})"
        for kind, names in kinds.items()
        if names
    ]
    return "; ".join(parts) or None


def _list(names: list[str]) -> str:
    return ", ".join(names[:LISTED]) + (f", and {len(names) - LISTED} more" if len(names) > LISTED else "")


def _backbone_config(name: str) -> parts.Backbone:
    return parts.Backbone(name=name, weights="none", freeze_at=0, frozen_bn=False, stride_in_1x1=False)


def _full_pyramid(channels: int) -> parts.FPNNeck:
    """Return the neck of other programs' detectors."""
    switches = {"top_down": True, "lateral": True, "upsample": "nearest", "smooth": "all"}
    return parts.FPNNeck(name="fpn", channels=channels, output="pyramid", p6="subsample", **switches)


@cache
def _backbone(name: str) -> tuple[Backbone, Shapes]:
    with torch.device("meta"):
        backbone = BACKBONES[name](_backbone_config(name))
    return backbone, shapes_of(backbone.state_dict())


def backbone_name(tensors: Mapping[str, Tensor]) -> str:
    """Return the name of our backbone that is most similar to these tensors, by their names first and their shapes second."""
    actual = shapes_of(backbone_part(dict(tensors)))

    def similarity(name: str) -> tuple[float, int]:
        shapes = _backbone(name)[1]
        return len(shapes.keys() & actual.keys()) / len(shapes.keys() | actual.keys()), len(shapes.items() & actual.items())

    return max((name for name in BACKBONES if name != "timm"), key=similarity)


def row_of(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the row of a detector that other programs train, "fpn" or "c4"; None: a backbone alone."""
    if all(name.startswith(STAGE) for name in tensors):
        return None
    return "fpn" if any(name.startswith("neck.") for name in tensors) else "c4"


def expected_shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    """Return names and shapes of the complete network that these tensors belong to.

    It is a backbone alone, or a detector as other programs train it: a full pyramid with a head of two layers, or C4 with conv5
    as the head. Its widths are those of the tensors. An RPN or a second stage is expected only if a tensor of it is there.
    """
    backbone, shapes = _backbone(backbone_name(tensors))
    row = row_of(tensors)
    width, conv5 = backbone.levels[STAGES.index("c4") - 1].channels, f"{STAGE}c5."
    expected = {f"backbone.{name}": shape for name, shape in shapes.items()}
    if row == "c4":
        head_shapes = {name: shape for name, shape in expected.items() if name.startswith(conv5)}
        expected = {name: shape for name, shape in expected.items() if name not in head_shapes}
    if row == "fpn":
        width = _side(tensors, "neck.", "weight", 0, 256)
        expected |= _shapes("neck.", lambda: FPN(backbone.levels, _full_pyramid(width)))
    if any(name.startswith("rpn.") for name in tensors):
        anchors = _side(tensors, "rpn.head.objectness", "weight", 0, 3)
        expected |= _shapes("rpn.head.", lambda: RPNHead(width, anchors))
    if any(name.startswith("roi.") for name in tensors):
        rows = _side(tensors, SCORES, "bias", 0, 1)
        classes = rows - 1 if rows > 1 else max(1, _side(tensors, DELTAS, "bias", 0, 4) // 4)
        if row == "c4":
            expected |= {f"{CONV5}{name.removeprefix(conv5)}": shape for name, shape in head_shapes.items()}
            out = backbone.out_channels
        else:
            out = _side(tensors, "roi.box_head.fc6", "weight", 0, 1024)
            side = max(1, round((_side(tensors, "roi.box_head.fc6", "weight", 1, 49 * width) / width) ** 0.5))
            expected |= _shapes("roi.box_head.", lambda: TwoFC(width, side, out))
        expected |= _shapes("roi.predictor.", lambda: Predictor(out, classes))
    return expected


def _shapes(prefix: str, build: Callable[[], nn.Module]) -> Shapes:
    with torch.device("meta"):
        return shapes_of(build().state_dict(), prefix)


def _side(tensors: Mapping[str, Tensor], layer: str, leaf: str, dim: int, otherwise: int) -> int:
    """Return one side of the first tensor of `layer`, or `otherwise` if there is none."""
    sides = (v.shape[dim] for n, v in tensors.items() if n.startswith(layer) and n.endswith(leaf) and v.dim() > dim)
    return max(1, next(sides, otherwise))

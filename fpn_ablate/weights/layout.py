"""Which network a set of tensors belongs to, and what it lacks of it or has too many."""

from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Size, Tensor, nn

from fpn_ablate.model.backbones.base import STAGES, Backbone
from fpn_ablate.model.backbones.registry import BACKBONES
from fpn_ablate.model.heads.box_head import Predictor, TwoFC
from fpn_ablate.model.heads.rpn import RPNHead
from fpn_ablate.model.necks.fpn import FPN
from fpn_ablate.weights.convert import DELTAS, SCORES, backbone_part
from fpn_ablate.weights.names import CONV5, STAGE

Shapes = dict[str, Size]
LISTED = 10  # names of a kind in a message
COUNTER = "num_batches_tracked"  # of batch norms that are trained: frozen ones and torch before 0.4.1 lack it, nothing needs it


def shapes_of(tensors: Mapping[str, Tensor], prefix: str = "") -> Shapes:
    return {prefix + name: value.shape for name, value in tensors.items()}


def misfit(wanted: Shapes, found: Shapes) -> str | None:
    """What does not fit, kind by kind, up to ten names each; None: all fits. Counters of batches do not matter."""
    wanted, found = ({n: s for n, s in shapes.items() if not n.endswith(COUNTER)} for shapes in (wanted, found))
    other = [
        f"{name} {tuple(found[name])} for {tuple(shape)}" for name, shape in wanted.items() if found.get(name, shape) != shape
    ]
    kinds = {
        "missing": [name for name in wanted if name not in found],
        "superfluous": [name for name in found if name not in wanted],
        "of another shape": other,
    }
    parts = [
        f"{len(those)} tensor{'s are' if len(those) > 1 else ' is'} {kind} ({_list(those)})"
        for kind, those in kinds.items()
        if those
    ]
    return "; ".join(parts) or None


def _list(those: list[str]) -> str:
    return ", ".join(those[:LISTED]) + (f", and {len(those) - LISTED} more" if len(those) > LISTED else "")


@cache
def _backbone(name: str) -> tuple[Backbone, Shapes]:
    with torch.device("meta"):
        backbone = BACKBONES[name]()
    return backbone, shapes_of(backbone.state_dict())


def backbone_name(tensors: Mapping[str, Tensor]) -> str:
    """Of our backbones the one whose tensors these are most alike: first by their names, then by their shapes."""
    found = shapes_of(backbone_part(dict(tensors)))

    def alike(name: str) -> tuple[float, int]:
        own = _backbone(name)[1]
        return len(own.keys() & found.keys()) / len(own.keys() | found.keys()), len(own.items() & found.items())

    return max(BACKBONES, key=alike)


def row(tensors: Mapping[str, Tensor]) -> str | None:
    """Which network that other programs train it is: "fpn" or "c4"; None: a backbone alone."""
    if all(name.startswith(STAGE) for name in tensors):
        return None
    return "fpn" if any(name.startswith("neck.") for name in tensors) else "c4"


def expected(tensors: Mapping[str, Tensor]) -> Shapes:
    """Names and shapes of the whole network that these tensors are taken from.

    That is a backbone alone, or a detector as other programs train it: a full pyramid with a head of two layers, or C4 with
    conv5 as the head. Its widths are read off the tensors. An RPN or a second stage of which nothing is there is not expected.
    """
    backbone, shapes = _backbone(backbone_name(tensors))
    kind, wanted = row(tensors), {}
    width, conv5 = backbone.levels[STAGES.index("c4") - 1].channels, f"{STAGE}c5."
    wanted = {f"backbone.{name}": shape for name, shape in shapes.items()}
    if kind == "c4":
        behind = {name: shape for name, shape in wanted.items() if name.startswith(conv5)}
        wanted = {name: shape for name, shape in wanted.items() if name not in behind}
    if kind == "fpn":
        width = _side(tensors, "neck.", "weight", 0, 256)
        wanted |= _shapes("neck.", lambda: FPN(backbone.levels, channels=width))
    if any(name.startswith("rpn.") for name in tensors):
        anchors = _side(tensors, "rpn.head.objectness", "weight", 0, 3)
        wanted |= _shapes("rpn.head.", lambda: RPNHead(width, anchors))
    if any(name.startswith("roi.") for name in tensors):
        rows = _side(tensors, SCORES, "bias", 0, 1)
        classes = rows - 1 if rows > 1 else max(1, _side(tensors, DELTAS, "bias", 0, 4) // 4)
        if kind == "c4":
            wanted |= {f"{CONV5}{name.removeprefix(conv5)}": shape for name, shape in behind.items()}
            out = backbone.out_channels
        else:
            out = _side(tensors, "roi.box_head.fc6", "weight", 0, 1024)
            side = max(1, round((_side(tensors, "roi.box_head.fc6", "weight", 1, 49 * width) / width) ** 0.5))
            wanted |= _shapes("roi.box_head.", lambda: TwoFC(width, side, out))
        wanted |= _shapes("roi.predictor.", lambda: Predictor(out, classes))
    return wanted


def _shapes(prefix: str, build: Callable[[], nn.Module]) -> Shapes:
    with torch.device("meta"):
        return shapes_of(build().state_dict(), prefix)


def _side(tensors: Mapping[str, Tensor], layer: str, leaf: str, dim: int, otherwise: int) -> int:
    """A side of the first tensor of `layer`."""
    sides = (v.shape[dim] for n, v in tensors.items() if n.startswith(layer) and n.endswith(leaf) and v.dim() > dim)
    return max(1, next(sides, otherwise))

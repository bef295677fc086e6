"""Load a file of weights into a network. Everything is checked first: a file that does not fit changes nothing."""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from fpn_ablate.model.backbones.torchvision import has_stride_in_1x1
from fpn_ablate.model.detectors.two_stage import Detector
from fpn_ablate.utils.console import log_line
from fpn_ablate.utils.errors import UserError
from fpn_ablate.weights import names
from fpn_ablate.weights.convert import COCO_ROWS, Options, Weights, backbone_part, convert
from fpn_ablate.weights.files import LISTED, Stored, read

# Parts that a network may lack although a file has them: the second stage if only the RPN is evaluated, the RPN if proposals
# come from a file, the mask branch if only boxes are.
OPTIONAL_PARTS = ("rpn.", "roi.", names.MASK)
# Of trained batch norms (frozen ones and torch before 0.4.1 lack it), and of the losses' normaliser: no detection needs them.
COUNTERS = ("num_batches_tracked", "moving_positives")


def misfit(expected: Mapping[str, Tensor], actual: Mapping[str, Tensor]) -> str | None:
    """List missing, unexpected and mis-shaped tensors, up to ten names of each; None: all fit. Counters are ignored."""
    expected, actual = ({n: t.shape for n, t in tensors.items() if not n.endswith(COUNTERS)} for tensors in (expected, actual))
    kinds = {
        "missing": [name for name in expected if name not in actual],
        "unexpected": [name for name in actual if name not in expected],
        "of another shape": [
            f"{name} {tuple(actual[name])} for {tuple(shape)}"
            for name, shape in expected.items()
            if actual.get(name, shape) != shape
        ],
    }
    parts = []
    for kind, listed in kinds.items():
        if listed:
            more = f", and {len(listed) - LISTED} more" if len(listed) > LISTED else ""
            parts.append(
                f"{len(listed)} tensor{'s are' if len(listed) > 1 else ' is'} {kind} ({', '.join(listed[:LISTED])}{more})"
            )
    return "; ".join(parts) or None


def open_weights(path: Path, options: Options | None = None) -> Weights:
    """Read a file of weights, ours or another program's, under our names.

    Raises:
        UserError: see `files.read` and `convert`; or it has tensors that no detector of ours has.
    """
    weights = convert(read(path), options)
    if network := names.other_detector(weights.unknown) or names.other_backbone(weights.source, weights.tensors):
        raise UserError(f"{weights.path}: {network}")
    if problem := misfit({}, weights.unknown):
        raise UserError(f"{weights.path} looks like a {weights.source}, but {problem}")
    return weights


def fit_to_model(model: Detector, path: Path, options: Options | None = None) -> Weights:
    """Read a file of any supported format, or a run's, as the tensors of `model`, which may be on the meta device.

    If the model has no RPN, second stage or mask branch, the file's is left out, and a note says so. A model of 90 classes
    takes all rows of a COCO detector of torchvision, any other the 80 that have a category.

    Raises:
        UserError: see `files.read` and `convert`; or the file does not fit the model.
    """
    state = model.state_dict()
    classes = model.num_classes
    if classes == COCO_ROWS - 1:
        options = replace(options or Options(), keep_classes=True)
    weights = convert(read(path), options)
    _note_other_strides(model, weights)
    for part in OPTIONAL_PARTS:
        theirs, ours = (any(name.startswith(part) for name in tensors) for tensors in (weights.tensors, state))
        if theirs and not ours:
            weights.tensors = {name: value for name, value in weights.tensors.items() if not name.startswith(part)}
            weights.notes.append(f"left out: {part}*, which this network does not have")
    if problem := misfit(state, weights.tensors | weights.unknown):
        hint = ""
        if model.rpn and model.roi and "task" in weights.facts and not any(n.startswith("rpn.") for n in weights.tensors):
            hint = (
                "; its RPN was trained in another run (task=fast_rcnn or task.training=separate), but one network with both is "
                "needed: task.training=joint or four_step makes one"
            )
        if classes and weights.facts.get("num_classes", str(classes)) != str(classes):
            hint += f"; it has {weights.facts['num_classes']} classes, and the data have {classes}"
        if "row" in weights.facts:
            hint += f"; it was trained as row {weights.facts['row']}"
        network = names.other_detector(weights.unknown) or names.other_backbone(weights.source, weights.tensors)
        raise UserError(f"{weights.path}{f': {network}. It' if network else ''} does not fit the network: {problem}{hint}")
    weights.tensors = {name: weights.tensors[name] for name in state if name in weights.tensors}
    return weights


def _note_other_strides(model: Detector, weights: Weights) -> None:
    trained, model_has = weights.facts.get("stride_in_1x1"), str(has_stride_in_1x1(model)).lower()
    if trained not in (None, model_has):
        weights.notes.append(f"WARNING: it was trained with backbone.stride_in_1x1={trained}, but this network has {model_has}")


def print_notes(path: Path, notes: Iterable[str]) -> None:
    """Print notes about a file on standard error."""
    for note in notes:
        log_line(f"{path}: {note}", sys.stderr)


def backbone_of(stored: Stored, name: str, backbone: Mapping[str, Tensor], stride_in_1x1: bool = False) -> dict[str, Tensor]:
    """Return the backbone's tensors of a file, under the names of `Backbone`; other tensors of the file are ignored.

    Args:
        name: the backbone's name (`backbone=resnet50`), for the message.
        backbone: its state dict.
        stride_in_1x1: where its strides are.

    Raises:
        UserError: the format is unknown, or the file's backbone is another one or has its strides elsewhere.
    """
    weights = convert(stored, backbone_only=True)
    tensors = backbone_part(weights.tensors)
    if problem := misfit(backbone, tensors):
        network = names.other_backbone(weights.source, weights.tensors)
        raise UserError(f"{stored.path}{f': {network}. It' if network else ''} does not fit backbone={name}: {problem}")
    trained = weights.facts.get("stride_in_1x1")
    if trained not in (None, str(stride_in_1x1).lower()):
        raise UserError(f"{stored.path} was trained with its strides elsewhere: set backbone.stride_in_1x1={trained}")
    print_notes(stored.path, weights.notes)
    return {key: tensors[key] for key in backbone if key in tensors}

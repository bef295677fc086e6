"""Filling a network from a file: everything is checked first, and what does not fit changes nothing."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Size, Tensor

from fpn_ablate.errors import UserError
from fpn_ablate.model.backbone import has_stride_in_1x1
from fpn_ablate.model.detector import Detector
from fpn_ablate.weights import names
from fpn_ablate.weights.convert import COCO_ROWS, Options, Weights, backbone_part, convert
from fpn_ablate.weights.files import Stored, read
from fpn_ablate.weights.layout import backbone_name, expected, misfit, row, shapes_of

# Stages that a file may have and a network lack: the second stage where the RPN alone is evaluated, and the RPN where proposals
# are given.
STAGES_APART = ("rpn", "roi")


def open_weights(path: Path, options: Options | None = None) -> Weights:
    """A file of weights, of ours or of another program, under our names; of others' all that their network has.

    Raises:
        UserError: see `files.read` and `convert`; or tensors are missing, superfluous or of another shape.
    """
    weights = convert(read(path), options)
    if weights.source == names.OURS and "backbone" in weights.facts:
        return weights
    facts = {**weights.facts, "backbone": backbone_name(weights.tensors)}
    if weights.source in (names.OURS, names.OUR_BACKBONE):
        return replace(weights, facts=facts)
    if kind := row(weights.tensors):
        facts["row"] = kind
    found = shapes_of(weights.tensors) | {name: Size() for name in weights.unknown}
    if problem := misfit(expected(weights.tensors), found):
        what = f"{weights.source}, {facts['backbone']}{f', row {kind}' if kind else ''}"
        raise UserError(f"{weights.stored.path} does not fit what it looks like ({what}; names are ours): {problem}")
    return replace(weights, facts=facts)


def load(
    model: Detector, path: Path, options: Options | None = None, say: Callable[[str], None] = lambda line: print(line)
) -> None:
    """Fill `model` from a file of any known format, or from a run's folder.

    A whole RPN or a whole second stage that the model lacks is left out, and `say` is told so. A model of 90 classes takes all
    rows of a COCO detector of torchvision, any other the 80 that have a category.

    Raises:
        UserError: see `open_weights`; or the file does not fit the model, which then stays as it was.
    """
    own = shapes_of(model.state_dict())
    if own.get("roi.predictor.scores.bias") == (COCO_ROWS,):
        options = replace(options or Options(), keep_classes=True)
    weights = open_weights(path, options)
    tensors = dict(weights.tensors)
    notes = list(weights.notes)
    for part in STAGES_APART:
        if getattr(model, part) is None and any(name.startswith(f"{part}.") for name in tensors):
            tensors = {name: value for name, value in tensors.items() if not name.startswith(f"{part}.")}
            notes.append(f"left out: {part}.*, which this network lacks")
    if problem := misfit(own, shapes_of(tensors)):
        raise UserError(f"{weights.stored.path} does not fit the network: {problem}")
    notes += _strides(model, weights)
    model.load_state_dict({name: tensors.get(name, value) for name, value in model.state_dict().items()})
    for note in notes:
        say(f"{weights.stored.path}: {note}")


def _strides(model: Detector, weights: Weights) -> list[str]:
    known, own = weights.facts.get("stride_in_1x1"), str(has_stride_in_1x1(model)).lower()
    if known in (None, own) or weights.facts.get("backbone", "") not in ("resnet50", "resnet101", "resnet152"):
        return []
    return [f"WARNING: it was trained with backbone.stride_in_1x1={known}, and this network has {own}"]


def backbone_of(stored: Stored, name: str, wanted: dict[str, Size]) -> dict[str, Tensor]:
    """The backbone's part of a file, under the names of `Backbone`. What else is in it does not matter.

    Args:
        name: what the backbone is called (`backbone=resnet50`), for the message.
        wanted: its names and shapes.

    Raises:
        UserError: the file is of no known kind, or its backbone is another one.
    """
    found = backbone_part(convert(stored).tensors)
    if problem := misfit(wanted, shapes_of(found)):
        raise UserError(f"{stored.path} does not fit backbone={name}: {problem}")
    return {key: found[key] for key in wanted if key in found}

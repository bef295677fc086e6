"""Filling a network from a file: everything is checked first, and what does not fit changes nothing."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Size, Tensor

from fpn_ablate.model.backbones.torchvision import has_stride_in_1x1
from fpn_ablate.model.detectors.two_stage import Detector
from fpn_ablate.utils.errors import UserError
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


def fit_to_model(model: Detector, path: Path, options: Options | None = None) -> Weights:
    """A file of any known format, or a run's, as the tensors that `model` takes; whether that is on a device does not matter.

    A whole RPN or a whole second stage that the model lacks is left out, which `notes` say. A model of 90 classes takes all
    rows of a COCO detector of torchvision, any other the 80 that have a category.

    Raises:
        UserError: see `open_weights`; or the file does not fit the model.
    """
    own = shapes_of(model.state_dict())
    if own.get("roi.predictor.scores.bias") == (COCO_ROWS,):
        options = replace(options or Options(), keep_classes=True)
    weights = open_weights(path, options)
    tensors, notes = dict(weights.tensors), [*weights.notes, *_strides(model, weights)]
    for part in STAGES_APART:
        if getattr(model, part) is None and any(name.startswith(f"{part}.") for name in tensors):
            tensors = {name: value for name, value in tensors.items() if not name.startswith(f"{part}.")}
            notes.append(f"left out: {part}.*, which this network lacks")
    if problem := misfit(own, shapes_of(tensors)):
        hint = ""
        if model.rpn and model.roi and weights.facts.get("task") and not any(name.startswith("rpn.") for name in tensors):
            hint = (
                "; its RPN is a run of its own (task=fast_rcnn, or task.training=separate), and one network is evaluated here"
            )
        scores = own.get("roi.predictor.scores.bias")
        if scores and weights.facts.get("num_classes", str(scores[0] - 1)) != str(scores[0] - 1):
            hint += f"; it tells {weights.facts['num_classes']} classes apart, and the data have {scores[0] - 1}"
        if weights.facts.get("row") in ("c4", "c5") and weights.facts["row"] not in {level.name for level in model.neck.levels}:
            hint += f"; it is row {weights.facts['row']}: give ablation={weights.facts['row']}"
        raise UserError(f"{weights.stored.path} does not fit the network: {problem}{hint}")
    return replace(weights, tensors={name: tensors[name] for name in own if name in tensors}, notes=notes)


def load(
    model: Detector, path: Path, options: Options | None = None, say: Callable[[str], None] = lambda line: print(line)
) -> None:
    """Fill `model` from what `fitted` makes of a file; its notes go to `say`.

    Raises:
        UserError: as there; the model stays as it was.
    """
    weights = fit_to_model(model, path, options)
    model.load_state_dict(weights.tensors, strict=False)  # but for counters of batches nothing is missing
    for note in weights.notes:
        say(f"{weights.stored.path}: {note}")


def _strides(model: Detector, weights: Weights) -> list[str]:
    known, own = weights.facts.get("stride_in_1x1"), str(has_stride_in_1x1(model)).lower()
    if known in (None, own) or weights.facts.get("backbone", "") not in ("resnet50", "resnet101", "resnet152"):
        return []
    return [f"WARNING: it was trained with backbone.stride_in_1x1={known}, and this network has {own}"]


def backbone_of(stored: Stored, name: str, wanted: dict[str, Size], stride_in_1x1: bool = False) -> dict[str, Tensor]:
    """The backbone's part of a file, under the names of `Backbone`. What else is in it does not matter.

    Args:
        name: what the backbone is called (`backbone=resnet50`), for the message.
        wanted: its names and shapes.
        stride_in_1x1: where its strides are.

    Raises:
        UserError: the file is of no known kind, or its backbone is another one, or has its strides elsewhere.
    """
    weights = convert(stored)
    found = backbone_part(weights.tensors)
    if problem := misfit(wanted, shapes_of(found)):
        raise UserError(f"{stored.path} does not fit backbone={name}: {problem}")
    if weights.facts.get("stride_in_1x1", "false") != str(stride_in_1x1).lower():
        raise UserError(
            f"{stored.path} was trained with its strides elsewhere: set backbone.stride_in_1x1={weights.facts['stride_in_1x1']}"
        )
    return {key: found[key] for key in wanted if key in found}

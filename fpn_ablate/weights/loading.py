"""Load a file of weights into a network. Everything is checked first: a file that does not fit changes nothing."""

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
from fpn_ablate.weights.layout import backbone_name, expected_shapes, misfit, row_of, shapes_of

# Stages that a network may lack although a file has them: the second stage if only the RPN is evaluated, the RPN if proposals
# come from a file.
OPTIONAL_STAGES = ("rpn", "roi")


def open_weights(path: Path, options: Options | None = None) -> Weights:
    """Read a file of weights, ours or another program's, under our names; a network of another program must be complete.

    Raises:
        UserError: see `files.read` and `convert`; or tensors are missing, unexpected or of another shape.
    """
    weights = convert(read(path), options)
    if weights.source == names.OURS and "backbone" in weights.facts:
        return weights
    facts = {**weights.facts, "backbone": backbone_name(weights.tensors)}
    if weights.source in (names.OURS, names.OUR_BACKBONE):
        return replace(weights, facts=facts)
    if row := row_of(weights.tensors):
        facts["row"] = row
    shapes = shapes_of(weights.tensors) | {name: Size() for name in weights.unknown}
    if problem := misfit(expected_shapes(weights.tensors), shapes):
        network = f"{weights.source}, {facts['backbone']}{f', row {row}' if row else ''}"
        raise UserError(f"{weights.stored.path} looks like {network}, but does not fit it (names are ours): {problem}")
    return replace(weights, facts=facts)


def fit_to_model(model: Detector, path: Path, options: Options | None = None) -> Weights:
    """Read a file of any supported format, or a run's, as the tensors of `model`, which may be on the meta device.

    If the model has no RPN or no second stage, the file's is left out, and a note says so. A model of 90 classes takes all rows
    of a COCO detector of torchvision, any other the 80 that have a category.

    Raises:
        UserError: see `open_weights`; or the file does not fit the model.
    """
    shapes = shapes_of(model.state_dict())
    if shapes.get("roi.predictor.scores.bias") == (COCO_ROWS,):
        options = replace(options or Options(), keep_classes=True)
    weights = open_weights(path, options)
    tensors, notes = dict(weights.tensors), [*weights.notes, *_strides(model, weights)]
    for part in OPTIONAL_STAGES:
        if getattr(model, part) is None and any(name.startswith(f"{part}.") for name in tensors):
            tensors = {name: value for name, value in tensors.items() if not name.startswith(f"{part}.")}
            notes.append(f"left out: {part}.*, which this network does not have")
    if problem := misfit(shapes, shapes_of(tensors)):
        hint = ""
        if model.rpn and model.roi and weights.facts.get("task") and not any(name.startswith("rpn.") for name in tensors):
            hint = (
                "; its RPN was trained in another run (task=fast_rcnn or task.training=separate), but one network with both is "
                "needed: task.training=joint or four_step makes one"
            )
        scores = shapes.get("roi.predictor.scores.bias")
        if scores and weights.facts.get("num_classes", str(scores[0] - 1)) != str(scores[0] - 1):
            hint += f"; it has {weights.facts['num_classes']} classes, and the data have {scores[0] - 1}"
        if weights.facts.get("row") in ("c4", "c5") and weights.facts["row"] not in {level.name for level in model.neck.levels}:
            hint += f"; it is row {weights.facts['row']}: set ablation={weights.facts['row']}"
        raise UserError(f"{weights.stored.path} does not fit the network: {problem}{hint}")
    return replace(weights, tensors={name: tensors[name] for name in shapes if name in tensors}, notes=notes)


def load(
    model: Detector, path: Path, options: Options | None = None, log: Callable[[str], None] = lambda line: print(line)
) -> None:
    """Load a file into `model`, by `fit_to_model`; its notes go to `log`.

    Raises:
        UserError: see `fit_to_model`; the model is unchanged.
    """
    weights = fit_to_model(model, path, options)
    model.load_state_dict(weights.tensors, strict=False)  # nothing is missing except batch counters
    for note in weights.notes:
        log(f"{weights.stored.path}: {note}")


def _strides(model: Detector, weights: Weights) -> list[str]:
    """Warn if the network's strides are not where they were when the weights were trained."""
    trained, model_has = weights.facts.get("stride_in_1x1"), str(has_stride_in_1x1(model)).lower()
    if trained in (None, model_has) or weights.facts.get("backbone", "") not in ("resnet50", "resnet101", "resnet152"):
        return []
    return [f"WARNING: it was trained with backbone.stride_in_1x1={trained}, but this network has {model_has}"]


def backbone_of(stored: Stored, name: str, shapes: dict[str, Size], stride_in_1x1: bool = False) -> dict[str, Tensor]:
    """Return the backbone's tensors of a file, under the names of `Backbone`; other tensors of the file are ignored.

    Args:
        name: the backbone's name (`backbone=resnet50`), for the message.
        shapes: its names and shapes.
        stride_in_1x1: where its strides are.

    Raises:
        UserError: the format is unknown, or the file's backbone is another one or has its strides elsewhere.
    """
    weights = convert(stored)
    tensors = backbone_part(weights.tensors)
    if problem := misfit(shapes, shapes_of(tensors)):
        raise UserError(f"{stored.path} does not fit backbone={name}: {problem}")
    if weights.facts.get("stride_in_1x1", "false") != str(stride_in_1x1).lower():
        raise UserError(
            f"{stored.path} was trained with its strides elsewhere: set backbone.stride_in_1x1={weights.facts['stride_in_1x1']}"
        )
    return {key: tensors[key] for key in shapes if key in tensors}

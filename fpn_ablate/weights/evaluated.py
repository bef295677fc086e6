"""Read the detector that mode=evaluate evaluates, and check that it fits the network and the data."""

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fpn_ablate.evaluation.coco import unique_names
from fpn_ablate.model.detectors.two_stage import Detector
from fpn_ablate.structures.batch import DetectionDataset
from fpn_ablate.utils.console import log_line
from fpn_ablate.utils.errors import UserError
from fpn_ablate.weights.convert import Weights
from fpn_ablate.weights.files import locate
from fpn_ablate.weights.loading import fit_to_model


@dataclass(frozen=True)
class EvaluatedWeights:
    """The tensors of a network, under our names, and the sha256 of their file."""

    tensors: dict[str, Tensor]
    digest: str


def read_evaluated(path: Path, model: Detector, dataset: DetectionDataset, settings: dict[str, Any]) -> EvaluatedWeights:
    """Read a file of weights, which must fit `model` and the categories of `dataset`.

    Our own files record the settings that they were trained with. If `settings` differ, a warning is printed and the file is
    accepted: the difference may be the question (another upsampling).

    Raises:
        UserError: the file cannot be read, or does not fit.
    """
    path = locate(path)
    weights = fit_to_model(model, path)
    _refuse_other_classes(weights, dataset)
    for note in [*weights.notes, *_differences(weights, settings)]:
        log_line(f"{path}: {note}", sys.stderr)
    with path.open("rb") as file:
        return EvaluatedWeights(weights.tensors, hashlib.file_digest(file, "sha256").hexdigest())


def _refuse_other_classes(weights: Weights, dataset: DetectionDataset) -> None:
    trained, classes = json.loads(weights.facts.get("classes", "null")), unique_names(dataset.categories)
    if trained and trained != classes:
        different = [f"{c!r}" for c in (*trained, *classes) if (c in trained) != (c in classes)] or ["their order"]
        raise UserError(
            f"{weights.stored.path} has other classes than {dataset.name}; the difference: {', '.join(different[:10])}"
        )


def _differences(weights: Weights, settings: dict[str, Any]) -> list[str]:
    trained = json.loads(weights.facts.get("settings", "{}"))
    settings = json.loads(json.dumps(settings))  # tuples become lists
    return [
        f"WARNING: it was trained with {key}={json.dumps(value)} and is evaluated with {json.dumps(settings[key])}"
        for key, value in trained.items()
        if key in settings and value != settings[key]
    ]

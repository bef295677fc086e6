"""Read the detector that mode=evaluate evaluates, and check that it fits the network and the data."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fpn_ablate.config.parts import UserPart
from fpn_ablate.config.user_parts import refuse_changed
from fpn_ablate.evaluation.coco import unique_names
from fpn_ablate.model.detectors.two_stage import Detector
from fpn_ablate.store import record
from fpn_ablate.structures.batch import DetectionDataset
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.paths import MODEL
from fpn_ablate.weights.convert import Weights
from fpn_ablate.weights.files import locate
from fpn_ablate.weights.loading import fit_to_model, print_notes


@dataclass(frozen=True)
class EvaluatedWeights:
    """The tensors of a network, under our names, and the sha256 of their file."""

    tensors: dict[str, Tensor]
    digest: str


def read_evaluated(
    path: Path,
    model: Detector,
    dataset: DetectionDataset,
    settings: dict[str, Any],
    user_parts: Mapping[str, UserPart] | None = None,
) -> EvaluatedWeights:
    """Read a file of weights, which must fit `model` and the categories of `dataset`.

    Our own files record the settings that they were trained with. If `settings` differ, a warning is printed and the file is
    accepted: the difference may be the question (another upsampling).

    Args:
        user_parts: of the network. A run that has such parts too must have been trained with the same files.

    Raises:
        UserError: the file cannot be read, or does not fit.
    """
    path = locate(path)
    _refuse_changed_parts(path, user_parts or {})
    weights = fit_to_model(model, path)
    _refuse_other_classes(weights, dataset)
    print_notes(path, [*weights.notes, *_differences(weights, settings)])
    with path.open("rb") as file:
        return EvaluatedWeights(weights.tensors, hashlib.file_digest(file, "sha256").hexdigest())


def _refuse_changed_parts(path: Path, parts: Mapping[str, UserPart]) -> None:
    content = record.read(path.parent) if path.name == MODEL else None
    recorded = (content or {}).get("user_parts")
    # A part that was ours in training is no other version of the user's: the network's shapes decide.
    trained = {key: part for key, part in parts.items() if isinstance(recorded, dict) and key in recorded}
    refuse_changed(trained, content or {}, path.parent)


def _refuse_other_classes(weights: Weights, dataset: DetectionDataset) -> None:
    trained, classes = json.loads(weights.facts.get("classes", "null")), unique_names(dataset.categories)
    if trained and trained != classes:
        different = [f"{c!r}" for c in (*trained, *classes) if (c in trained) != (c in classes)] or ["their order"]
        raise UserError(f"{weights.path} has other classes than {dataset.name}; the difference: {', '.join(different[:10])}")


def _differences(weights: Weights, settings: dict[str, Any]) -> list[str]:
    trained = json.loads(weights.facts.get("settings", "{}"))
    settings = json.loads(json.dumps(settings))  # tuples become lists
    return [
        f"WARNING: it was trained with {key}={json.dumps(value)} and is evaluated with {json.dumps(settings[key])}"
        for key, value in trained.items()
        if key in settings and value != settings[key]
    ]

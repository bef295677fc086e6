"""The detector in a file (mode=evaluate), held against the configuration and the data that it is to be evaluated with."""

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
    """Tensors under our names, all that the network needs; and the sha256 of the file."""

    tensors: dict[str, Tensor]
    digest: str


def read_evaluated(path: Path, model: Detector, dataset: DetectionDataset, settings: dict[str, Any]) -> EvaluatedWeights:
    """The file `weights` of a configuration, which must fit the network and the categories of `dataset`.

    In what the network is trained and tested with, which a file of ours knows, the configuration may differ: that can be the
    question (another upsampling), so it is said and not refused.

    Raises:
        UserError: it cannot be read, or does not fit.
    """
    path = locate(path)
    weights = fit_to_model(model, path)
    _refuse_other_classes(weights, dataset)
    for note in [*weights.notes, *_differences(weights, settings)]:
        log_line(f"{path}: {note}", sys.stderr)
    with path.open("rb") as file:
        return EvaluatedWeights(weights.tensors, hashlib.file_digest(file, "sha256").hexdigest())


def _refuse_other_classes(weights: Weights, dataset: DetectionDataset) -> None:
    known, own = json.loads(weights.facts.get("classes", "null")), unique_names(dataset.categories)
    if known and known != own:
        only = [f"{name!r}" for name in (*known, *own) if (name in known) != (name in own)] or ["their order"]
        raise UserError(
            f"{weights.stored.path} tells other classes apart than {dataset.name} has; what differs: {', '.join(only[:10])}"
        )


def _differences(weights: Weights, settings: dict[str, Any]) -> list[str]:
    known = json.loads(weights.facts.get("settings", "{}"))
    own = json.loads(json.dumps(settings))
    differing = [
        f"{key}={json.dumps(known[key])}, here {json.dumps(own[key])}" for key in known if key in own and known[key] != own[key]
    ]
    return [f"WARNING: it was made with {text}" for text in differing]

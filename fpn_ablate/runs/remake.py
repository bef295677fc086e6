"""Measure finished runs again, and make their artifacts again, from their saved weights and detections."""

import sys
from pathlib import Path

import numpy as np

from fpn_ablate.engine.cost import end_to_end_latency_ms
from fpn_ablate.runs.artifacts import make_artifacts
from fpn_ablate.runs.pyramid import inspect_pyramid
from fpn_ablate.runs.restore import load_detections, load_finished, restore
from fpn_ablate.store import record
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.files import UNREADABLE, open_arrays
from fpn_ablate.utils.paths import ARTIFACTS, INSPECTED, PROPOSED


def measure_again(folder: Path, measured: dict[str, float], config_dir: Path | None = None) -> str:
    """Measure the latency of a run, write it into its record, and return a line about it.

    Args:
        measured: latencies by fingerprint: a run that is in several tables is measured once.

    Raises:
        UserError: see `restore`.
    """
    content = record.read(folder) or {}
    fingerprint = str(content.get("fingerprint"))
    if fingerprint not in measured:
        trained, cfg, device = restore(folder, config_dir)
        measured[fingerprint] = end_to_end_latency_ms(trained, cfg.recipe, device)
    content = record.read(folder) or content  # which another process may have changed meanwhile
    before, content["cost"]["latency_ms"] = content["cost"]["latency_ms"], measured[fingerprint]
    record.write(folder, content)
    return f"{content['table']} {content['row']} seed {content['seed']}: {measured[fingerprint]} ms, was {before}"


def remake_artifacts(folder: Path, config_dir: Path | None = None) -> str:
    """Make the artifacts of a run again, update its record, and return a line about it.

    Raises:
        UserError: see `load_finished` and `load_detections`.
    """
    cfg, content, (_, dataset) = load_finished(folder)
    detections = load_detections(folder)
    proposals = load_detections(folder, PROPOSED) if cfg.proposal_recall else None
    inspected = _inspect_again(folder, config_dir)
    artifacts = make_artifacts(folder, dataset, detections, cfg.recipe.eval_images, inspected, proposals)
    record.write(folder, (record.read(folder) or content) | artifacts)
    return f"{folder}: made"


def _inspect_again(folder: Path, config_dir: Path | None) -> dict[str, np.ndarray]:
    """Inspect a run's pyramid; if its network cannot be restored on this machine, read what was saved."""
    try:
        trained, cfg, device = restore(folder, config_dir)
        return inspect_pyramid(trained.model, trained.validation, cfg.recipe, device, cfg.recipe.eval_images)
    except UserError as error:
        print(f"activation maps stay as they were: {error}", file=sys.stderr)
    try:
        with open_arrays(folder / ARTIFACTS) as saved:
            return {name: saved[name] for name in saved.files if name.startswith(INSPECTED)}
    except UNREADABLE:
        return {}

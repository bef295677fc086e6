"""Measure finished runs again, and make their artifacts again, from their saved weights and detections."""

import sys
from pathlib import Path

import numpy as np

from fpn_ablate.engine.cost import end_to_end_latency_ms
from fpn_ablate.evaluation.coco import DetectionSet
from fpn_ablate.runs.artifacts import activation_maps, make_artifacts
from fpn_ablate.runs.restore import LoadedSplits, load_finished, restore
from fpn_ablate.store import record
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.files import UNREADABLE
from fpn_ablate.utils.paths import ARTIFACTS, DETECTIONS


class Latencies:
    """Latencies by fingerprint: a run that is in several tables is measured once."""

    def __init__(self, config_dir: Path | None = None) -> None:
        self.config_dir = config_dir  # of the user's parts
        self.measured: dict[str, float] = {}

    def update(self, folder: Path, splits: LoadedSplits) -> str:
        """Measure the latency of a run, write it into its record, and return a line about it.

        Raises:
            UserError: see `restore`.
        """
        content = record.read(folder) or {}
        fingerprint = str(content.get("fingerprint"))
        if fingerprint not in self.measured:
            self.measured[fingerprint] = self._latency_ms(folder, splits)
        latency = self.measured[fingerprint]
        before, content["cost"]["latency_ms"] = content["cost"]["latency_ms"], latency
        record.write(folder, content)
        return f"{content['table']} {content['row']} seed {content['seed']}: {latency} ms, was {before}"

    def _latency_ms(self, folder: Path, splits: LoadedSplits) -> float:
        trained, cfg, device = restore(folder, splits, self.config_dir)
        return end_to_end_latency_ms(trained, cfg.recipe, device)


def remake_artifacts(folder: Path, splits: LoadedSplits, config_dir: Path | None = None) -> str:
    """Make the artifacts of a run again, update its record, and return a line about it.

    Raises:
        UserError: see `load_finished`.
    """
    cfg, content, (_, dataset) = load_finished(folder, splits)
    detections = DetectionSet.load(folder / DETECTIONS)
    maps = _activation_maps_of(folder, splits, config_dir)
    record.write(folder, content | make_artifacts(folder, dataset, detections, cfg.recipe.eval_images, maps))
    return f"{folder}: made"


def _activation_maps_of(folder: Path, splits: LoadedSplits, config_dir: Path | None) -> dict[str, np.ndarray]:
    """Compute a run's activation maps; if its network cannot be restored on this machine, read the saved maps."""
    try:
        trained, cfg, device = restore(folder, splits, config_dir)
        return activation_maps(trained.model, trained.validation, cfg.recipe, device)
    except UserError as error:
        print(f"activation maps stay as they were: {error}", file=sys.stderr)
    try:
        with np.load(folder / ARTIFACTS, allow_pickle=False) as saved:
            return {name.removeprefix("level_"): saved[name] for name in saved.files if name.startswith("level_")}
    except UNREADABLE:
        return {}

"""Probe the feature levels of finished runs, all on the same places of the same pictures."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fpn_ablate import __version__
from fpn_ablate.config import user_parts
from fpn_ablate.config.schema import Config
from fpn_ablate.data.shapes import ShapesDataset
from fpn_ablate.engine.inputs import Inputs, load_data, pick_device
from fpn_ablate.engine.probe import choose_places, features_at, probe
from fpn_ablate.engine.train import place
from fpn_ablate.evaluation.coco import AREAS
from fpn_ablate.model.build import build_detector
from fpn_ablate.model.detectors.two_stage import Detector
from fpn_ablate.model.optimise import optimise
from fpn_ablate.runs.environment import device_name
from fpn_ablate.runs.restore import read_finished, refuse_changed_data
from fpn_ablate.structures.batch import DetectionDataset
from fpn_ablate.utils.console import log_line
from fpn_ablate.utils.errors import UserError, first_line
from fpn_ablate.utils.files import unreadable
from fpn_ablate.utils.paths import MODEL
from fpn_ablate.weights.files import load_torch


def probe_runs(folders: Sequence[Path], count: int, config_dir: Path | None = None) -> dict[str, Any]:
    """Probe runs on `count` pictures of each split.

    Returns:
        {"format": 1, "version", "data", "generated", "background", "categories": K, "pictures": {"train", "val"}, "objects":
        {"train": {size: number}, "val": ...}, "runs": [{"folder", "table", "row", "seed", "device", "features": {level: d},
        "levels"}]}; `levels` is as `engine.probe.probe` returns it, each accuracy as the attributes of `Accuracy`.

    Raises:
        UserError: a run is not finished or not readable, its data have changed or have no objects, the runs are on different
            data, or both splits are one.
    """
    configs, devices, digests = [], [], []
    for folder in folders:
        cfg, content = read_finished(folder, config_dir)
        user_parts.refuse_changed(cfg.user_parts, content, folder)
        training, validation = load_data(cfg.data, cfg.recipe, "train", cfg.task.masks)
        read = {"train": training} if cfg.mode == "train" else {}  # mode=evaluate reads the validation split alone
        refuse_changed_data(folder, content, val=validation, **read)
        configs.append(cfg)
        devices.append(pick_device(cfg.device))
        digests.append((training.digest, validation.digest))
        if digests[0] != digests[-1]:
            raise UserError(f"{folders[0]} and {folder}: different data; probe them one by one")
    if Inputs(devices[0], training, validation).trains_on_validation:
        raise UserError(f"{folders[0]}: training and validation split are one, so nothing is left to measure on")
    there, here = choose_places(training, "train", count), choose_places(validation, "val", count)
    runs = []
    for folder, cfg, device in zip(folders, configs, devices, strict=True):
        log_line(f"{cfg.row} seed {cfg.seed}: reading its levels on {count} pictures of each split", sys.stderr)
        model = load_trunk(folder, cfg, device)
        features = [features_at(model, data, at, cfg.recipe, device) for data, at in ((training, there), (validation, here))]
        levels = {
            level: {area: {name: value and asdict(value) for name, value in of_area.items()} for area, of_area in areas.items()}
            for level, areas in probe(there, features[0], here, features[1]).items()
        }
        named = {"folder": str(folder), "table": cfg.table, "row": cfg.row, "seed": cfg.seed, "device": device_name(device)}
        runs.append(named | {"features": {level: values.shape[1] for level, values in features[0].items()}, "levels": levels})
    return {
        "format": 1,
        "version": __version__,
        "data": validation.name,
        "generated": validation.generated,
        "background": _background(validation),
        "categories": len(validation.categories),
        "pictures": {name: len(set(at.pictures.tolist())) for name, at in (("train", there), ("val", here))},
        "objects": {
            name: {area: int(((at.areas == n) & (at.labels > 0)).sum()) for n, area in list(enumerate(AREAS))[1:]}
            for name, at in (("train", there), ("val", here))
        },
        "runs": runs,
    }


def _background(dataset: DetectionDataset) -> str:
    if not isinstance(dataset, ShapesDataset):
        return "places outside all boxes"
    tells = "the time of day" if dataset.world.context else "their marks (no context)"
    return f"distractors of their size, told apart by {tells}"


def load_trunk(folder: Path, cfg: Config, device: torch.device) -> Detector:
    """Load backbone and neck of a finished run."""
    model = place(build_detector(cfg, heads=()), device)
    if cfg.recipe.fast:
        model = optimise(model, device)
    names = model.state_dict()
    try:
        model.load_state_dict({name: value for name, value in load_torch(folder / MODEL).items() if name in names})
    except Exception as error:  # torch raises many kinds for a file that is not one of its own
        reason = first_line(error)
        raise unreadable(folder / MODEL, error, reason) from None
    return model.eval()

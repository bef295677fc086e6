"""Probe the feature levels of finished runs, all on the same places of the same pictures."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fpn_ablate.config import user_parts
from fpn_ablate.config.schema import Config, Shapes
from fpn_ablate.data.shapes import ShapesDataset
from fpn_ablate.engine.inputs import Inputs, load_data, pick_device
from fpn_ablate.engine.probe import choose_places, features_at, probe
from fpn_ablate.engine.train import place
from fpn_ablate.evaluation.coco import AREAS
from fpn_ablate.model.build import build_detector
from fpn_ablate.model.detectors.two_stage import Detector
from fpn_ablate.model.optimise import optimise
from fpn_ablate.runs.restore import read_finished
from fpn_ablate.structures.batch import Splits
from fpn_ablate.utils.errors import UserError, first_line
from fpn_ablate.utils.paths import MODEL
from fpn_ablate.weights.files import load_torch


def probe_runs(folders: Sequence[Path], count: int, config_dir: Path | None = None) -> dict[str, Any]:
    """Probe runs on `count` pictures of each split.

    Returns:
        {"format": 1, "data", "generated", "background", "categories": K, "pictures": {"train", "val"}, "objects": {"train":
        {size: number}, "val": ...}, "runs": [{"folder", "table", "row", "seed", "levels"}]}; `levels` is as
        `engine.probe.probe` returns it, each accuracy as {"value", "low", "high"}.

    Raises:
        UserError: a run is not finished or not readable, the runs are on different data, or both splits are one.
    """
    device, configs = pick_device("auto"), []
    for folder in folders:
        cfg, content = read_finished(folder, config_dir)
        user_parts.refuse_changed(cfg.user_parts, content, folder)
        configs.append(cfg)
    splits = _load_data(configs[0], count)
    for folder, cfg in zip(folders, configs, strict=True):
        if [split.digest for split in _load_data(cfg, count)] != [split.digest for split in splits]:
            raise UserError(f"{folders[0]} and {folder}: different data; probe them one by one")
    if Inputs(device, *splits).trains_on_validation:
        raise UserError(f"{folders[0]}: training and validation split are one, so nothing is left to measure on")
    training, validation = splits
    there, here = choose_places(training, "train", count), choose_places(validation, "val", count)
    runs = []
    for folder, cfg in zip(folders, configs, strict=True):
        model = load_trunk(folder, cfg, device)
        features = [features_at(model, data, at, cfg.recipe, device) for data, at in ((training, there), (validation, here))]
        levels = {
            level: {area: {name: value and asdict(value) for name, value in of_area.items()} for area, of_area in areas.items()}
            for level, areas in probe(there, features[0], here, features[1]).items()
        }
        runs.append({"folder": str(folder), "table": cfg.table, "row": cfg.row, "seed": cfg.seed, "levels": levels})
    return {
        "format": 1,
        "data": validation.name,
        "generated": validation.generated,
        "background": "distractors of their size" if isinstance(validation, ShapesDataset) else "places outside all boxes",
        "categories": len(validation.categories),
        "pictures": {name: len(set(at.pictures.tolist())) for name, at in (("train", there), ("val", here))},
        "objects": {
            name: {area: int(((at.areas == n) & (at.labels > 0)).sum()) for n, area in list(enumerate(AREAS))[1:]}
            for name, at in (("train", there), ("val", here))
        },
        "runs": runs,
    }


def _load_data(cfg: Config, count: int) -> Splits:
    data = cfg.data
    if isinstance(data, Shapes):  # rendering is slow, so the set holds only the pictures that are probed
        sizes = {key: min(count, getattr(data, key)) for key in ("train_images", "val_images")}
        data = data.model_copy(update=sizes)
    return load_data(data, cfg.recipe, "train")


def load_trunk(folder: Path, cfg: Config, device: torch.device) -> Detector:
    """Load backbone and neck of a finished run."""
    model = place(build_detector(cfg, heads=()), device)
    if cfg.recipe.fast:
        model = optimise(model, device)
    names = model.state_dict()
    try:
        model.load_state_dict({name: value for name, value in load_torch(folder / MODEL).items() if name in names})
    except Exception as error:  # torch raises many kinds for a file that is not one of its own
        raise UserError(f"{folder / MODEL}: cannot be read ({first_line(error)})") from None
    return model.eval()

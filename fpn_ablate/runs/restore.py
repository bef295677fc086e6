"""Load finished runs: configuration, record, data and weights."""

from pathlib import Path
from typing import Any

import torch

from fpn_ablate.config.schema import Config
from fpn_ablate.config.validation import load_saved_config
from fpn_ablate.engine import procedures
from fpn_ablate.engine.inputs import Inputs, load_data, load_fixed_proposals, pick_device
from fpn_ablate.runs import environment
from fpn_ablate.store import record
from fpn_ablate.store.lookup import find_run
from fpn_ablate.structures.batch import DetectionDataset
from fpn_ablate.utils.errors import UserError

Splits = dict[str, tuple[DetectionDataset, DetectionDataset]]


def load_finished(folder: Path, splits: Splits) -> tuple[Config, dict[str, Any], tuple[DetectionDataset, DetectionDataset]]:
    """Configuration, record and data of the finished run of a folder below <out>/runs. `splits` keeps what has been loaded.

    Raises:
        UserError: the run is not finished, or what it is made of is no longer there.
    """
    known = record.read(folder) or {}
    if known.get("status") != "finished":
        raise UserError(f"{folder}: no finished run")
    cfg = load_saved_config(folder / "config.yaml")
    cfg = cfg.model_copy(update={"out": str(folder.resolve().parents[4])})
    data = str((cfg.mode, cfg.data, cfg.recipe.short_side, cfg.recipe.max_side, cfg.recipe.eval_images))
    if data not in splits:
        splits[data] = load_data(cfg.data, cfg.recipe, cfg.mode)
    return cfg, known, splits[data]


def restore(folder: Path, splits: Splits) -> tuple[procedures.Trained, Config, torch.device]:
    """The finished run of a folder, with its weights.

    Raises:
        UserError: as `finished`, or the run was made on another device.
    """
    cfg, known, loaded = load_finished(folder, splits)
    device, made_on = pick_device(cfg.device), known["environment"]
    if environment.device_name(device) != made_on["device"]:
        raise UserError(
            f"{folder}: made on {made_on['device']}, and this is {environment.device_name(device)}; measure it there"
        )
    torch.set_num_threads(made_on["threads"])
    inputs = Inputs(device, *loaded, None, None, *load_fixed_proposals(cfg.task, loaded, cfg.recipe.eval_images))
    cell = procedures.RunContext(cfg, inputs, folder, known["fingerprint"], {}, lambda step, values: None)
    if "rpn" in procedures.sources(cfg):
        source = find_run(cfg.out, cfg.seed, known["proposals"]["fingerprint"])
        if source is None:
            raise UserError(f"{folder}: the run {known['proposals']['fingerprint'][:8]}, whose RPN it uses, is gone")
        cell.sources["rpn"] = source
    return procedures.restore(cell, procedures.prepare_proposals(cell)), cfg, device

"""Load finished runs: configuration, record, data and weights."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from fpn_ablate.config import user_parts
from fpn_ablate.config.factors import flatten
from fpn_ablate.config.schema import Config
from fpn_ablate.config.sources import sources
from fpn_ablate.config.validation import load_saved_config
from fpn_ablate.data.coco import CocoDataset
from fpn_ablate.engine import procedures
from fpn_ablate.engine.inputs import Inputs, load_data, load_fixed_proposals, pick_device
from fpn_ablate.evaluation.coco import DetectionSet
from fpn_ablate.model.precision import uses_bf16
from fpn_ablate.runs import environment
from fpn_ablate.store import record
from fpn_ablate.store.layout import find_run
from fpn_ablate.structures.batch import DetectionDataset, Splits
from fpn_ablate.utils.errors import UserError, first_line, short_repr
from fpn_ablate.utils.files import UNREADABLE, unreadable
from fpn_ablate.utils.paths import CONFIG, DETECTIONS, RECORD

# Of what a record says, that on which the run's restoration stands.
KINDS = {"images.count": int, "images.digest": str, "environment.device": str, "environment.threads": int}

_load_data = lru_cache(maxsize=4)(load_data)  # several runs share a data set


def read_finished(folder: Path, config_dir: Path | None = None) -> tuple[Config, dict[str, Any]]:
    """Read configuration and record of a finished run.

    Args:
        config_dir: the folder of the user's parts. None of them is imported here.

    Raises:
        UserError: the run is not finished, or a file cannot be read.
    """
    content = record.read(folder)
    if not content:
        raise UserError(f"{folder}: no readable record.json; give the folder of one run, .../seed<k>-<hash>")
    if content.get("status") != "finished":
        raise UserError(f"{folder}: the run is {content.get('status')}, not finished; start it again to continue it")
    found = flatten(content)
    for key, kind in KINDS.items():
        if type(found.get(key)) is not kind:
            problem = f"{folder / RECORD}: key '{key}' must be {kind.__name__}, found {short_repr(found.get(key))}"
            raise UserError(f"{problem}; remove its folder to train the run again")
    return load_saved_config(folder / CONFIG, config_dir), content


def load_finished(folder: Path, config_dir: Path | None = None) -> tuple[Config, dict[str, Any], Splits]:
    """Load configuration, record and data of a finished run in a folder below <out>/runs.

    Raises:
        UserError: as `read_finished`; or the data are missing, broken or no longer those of the run.
    """
    cfg, content = read_finished(folder, config_dir)
    cfg = cfg.model_copy(update={"out": str(folder.resolve().parents[4])})
    training, validation = splits = _load_data(cfg.data, cfg.recipe, cfg.mode, cfg.task.masks)
    refuse_changed_data(folder, content, val=validation, train=training)
    return cfg, content, splits


def refuse_changed_data(folder: Path, content: dict[str, Any], **splits: DetectionDataset) -> None:
    """Check that `splits`, by name, are those that a finished run read: its figures and new ones would be of two data sets.

    Args:
        folder, content: the run, and its record. Older records hold no digests, and any data pass.

    Raises:
        UserError: a split has other pictures or annotations.
    """
    digests = content.get("data_digest")
    for name, split in splits.items():
        if isinstance(digests, dict) and digests.get(name, split.digest) != split.digest:
            place = f"{split.files[0]} or its pictures" if isinstance(split, CocoDataset) else "the generated pictures"
            raise UserError(
                f"{folder}: {place}, the split {name!r}, have changed since this run was made. Put the data back as they were, "
                "or start the row again: on other data it is another run"
            )


def load_detections(folder: Path, name: str = DETECTIONS) -> DetectionSet:
    """Load the saved detections of a finished run, or what else is in its file `name`.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = folder / name
    try:
        detections = DetectionSet.load(path)
        arrays = {name: array for name, array in vars(detections).items() if array is not None and name != "masks"}
        count = len(detections.boxes)
        for name, array in arrays.items():
            if array.dtype.kind not in "iuf" or array.shape != ((count, 4) if name == "boxes" else (count,)):
                raise ValueError(f"{name} holds {array.dtype} of shape {array.shape} for {count} boxes")
        if detections.masks is not None and len(detections.masks) != count:
            raise ValueError(f"{len(detections.masks)} masks for {count} boxes")
    except UNREADABLE as error:
        raise unreadable(path, error, first_line(error)) from None
    return detections


def restore(folder: Path, config_dir: Path | None = None) -> tuple[procedures.Trained, Config, torch.device]:
    """Load the network of a finished run, with its configuration and device. The arguments are those of `load_finished`.

    Raises:
        UserError: as `load_finished`; the run was made on another device or in another precision; or it has a user's part whose
            files are not in `config_dir` as they were.
    """
    cfg, content, loaded = load_finished(folder, config_dir)
    user_parts.refuse_changed(cfg.user_parts, content, folder)
    device, made_on = pick_device(cfg.device), content["environment"]
    if environment.device_name(device) != made_on["device"]:
        raise UserError(
            f"{folder}: made on {made_on['device']}, but this is {environment.device_name(device)}; use that machine"
        )
    here = uses_bf16(cfg.recipe.bf16, device)
    if content.get("bf16", here and device.type == "cuda") != here:  # records that do not say it are older than bf16 on CPUs
        raise UserError(f"{folder}: made in {'fp32' if here else 'bf16'}, which this machine does not use: train the run again")
    torch.set_num_threads(made_on["threads"])
    inputs = Inputs(device, *loaded, None, None, *load_fixed_proposals(cfg.task, loaded, cfg.recipe.eval_images))
    context = procedures.RunContext(cfg, inputs, folder, content["fingerprint"], {}, lambda step, values: None)
    if "rpn" in sources(cfg):
        source = find_run(cfg.out, cfg.seed, content["proposals"]["fingerprint"])
        if source is None:
            raise UserError(f"{folder}: the run {content['proposals']['fingerprint'][:8]}, whose RPN it uses, is missing")
        context.sources["rpn"] = source
    return procedures.restore(context, procedures.prepare_proposals(context)), cfg, device

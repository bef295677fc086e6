"""Read files of weights of any program, and write our own.

Nothing in a file is run: torch's are read with weights_only, pickles by `unpickle`, and safetensors contain no code.
"""

import argparse
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
import yaml
from torch import Tensor

from fpn_ablate.utils.errors import UserError, first_line
from fpn_ablate.utils.files import UNREADABLE, refuse_bomb, write_atomically
from fpn_ablate.utils.paths import CONFIG, MODEL, RECORD
from fpn_ablate.weights import unpickle
from fpn_ablate.weights.names import recognise

VERSION = "2"  # of our safetensors; increased when names, shapes or settings change their meaning
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch before 1.6
# Keys that decide what a detector computes with given weights, beside all of `neck` but the start of its weights.
INFERENCE = {
    "rpn": ("head", "relu", "shared", "anchor_sizes", "anchor_ratios", "anchor_grid"),
    "recipe": ("short_side", "max_side", "antialias"),
    "task": (
        *("mlp", "mask", "scales", "ratio_7x7", "padding", "relu", "mask_threshold"),
        *("anchor_sizes", "anchor_scales", "anchor_ratios", "anchor_grid"),
        *("points", "centerness", "score", "distances", "priors"),
        *("first_scale", "whole_percent", "ratios", "outer_ratios", "clip", "variances"),
    ),
    "task.roi": (
        *("head", "levels", "pooling", "sampling_ratio", "resolution", "conv5_resolution"),
        *("canonical_level", "canonical_box_size", "box_weights"),
    ),
    "task.mask": ("resolution",),
}
# Keys of the state dict in what training programs save: detectron2 and torchvision, Caffe2, timm and Lightning, others.
_CONTAINERS = ("model", "blobs", "state_dict", "model_state_dict")
_WRAPPERS = {"module", "model", "net", "network"}  # of DistributedDataParallel, Lightning and others
LISTED = 10  # names in a message
_EXPECTED = "expected a dictionary of tensors, as torch.save(model.state_dict())"


@dataclass(frozen=True)
class Stored:
    """The tensors of a file under its own names, its metadata (`facts`, as text), and sentences for the user (`notes`)."""

    path: Path
    tensors: dict[str, Tensor]
    facts: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def locate(path: Path) -> Path:
    """Return the path of a file of weights; of a run's folder, that of its model.pt.

    Raises:
        UserError: there is no such file.
    """
    if path.is_dir():
        if not (path / MODEL).is_file():
            raise UserError(f"{path}: no finished run ({MODEL} is missing); give a run's folder or a file of weights")
        path = path / MODEL
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return path


def read(path: Path) -> Stored:
    """Read a file of weights, or model.pt of a run's folder with facts from its config.yaml.

    Raises:
        UserError: there is no such file, it is damaged, it contains other things than tensors, or it would run code.
    """
    path = locate(path)
    try:
        with path.open("rb") as file:
            head = file.read(len(_OLD_TORCH))
        if head.startswith(_ZIP) or head == _OLD_TORCH:
            content, facts = load_torch(path), _run_facts(path)
        # Its first eight bytes, the header's length, may begin as a pickle does.
        elif head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
            content, facts = _safetensors(path)
        elif head.startswith(_PICKLE):
            content = unpickle.read(path.read_bytes())
            facts = {"author": str(content.get("__author__", "")) if isinstance(content, dict) else ""}
        else:
            raise ValueError("neither torch's format, nor safetensors, nor a pickle")
        content, notes = _open_container(content)
        return Stored(path, _tensors(content, path.stat().st_size), facts, notes)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # of any type: the three readers raise whatever a damaged file causes
        raise UserError(f"{path}: not a readable state dict ({first_line(error)})") from None


def load_torch(path: Path) -> Any:
    """Read a file of torch.save without running code in it.

    Raises:
        Exception: of any type; in words if it unpacks to more than its size, or holds more than tensors and plain values.
    """
    with path.open("rb") as file:
        is_zip = file.read(len(_ZIP)) == _ZIP
    if is_zip:
        refuse_bomb(path, 1, 10**6)  # torch does not compress
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # torchvision's training stores its arguments
            return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        if re.search("weights.only", str(error), re.IGNORECASE):  # torch advises to read it without that guard
            raise ValueError("damaged, or it holds more than tensors, which could run code; only those are read") from None
        raise


def _open_container(content: Any) -> tuple[Any, list[str]]:
    """Return the state dict in what a training program saved, and a note about others beside it, such as averaged weights.

    Raises:
        UserError: state dicts are below unknown keys alone.
    """
    notes = []
    for key in _CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            if others := [name for name in _state_dicts(content) if name != key]:
                notes.append(f"{key!r} is read, not {_with_fix(others)}")
            content = content[key]
    if others := _state_dicts(content):
        raise UserError(f"its tensors are below {_with_fix(others)}")
    return content, notes


def _with_fix(keys: list[str]) -> str:
    return f"{' or '.join(map(repr, keys[:LISTED]))}; to use that, save torch.load(FILE)[{keys[0]!r}] alone"


def _state_dicts(content: Any) -> list[str]:
    """Return the keys below which there are dictionaries of tensors."""
    entries = content.items() if isinstance(content, dict) else ()
    inner = [(k, v) for k, v in entries if isinstance(k, str) and isinstance(v, dict) and v]
    return [k for k, v in inner if all(isinstance(value, Tensor | np.ndarray) for value in v.values())]


def _tensors(content: Any, size: int) -> dict[str, Tensor]:
    """Return the tensors of a state dict from a file of `size` bytes, by name, without prefixes of what they were wrapped in.

    Raises:
        UserError: it contains something else, values that are not finite, or tensors that claim far more than `size`.
    """
    if isinstance(content, dict):
        content = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in content.items()}
    if not isinstance(content, dict) or not content or not all(isinstance(k, str) for k in content):
        raise UserError(_EXPECTED)
    others = [k for k, v in content.items() if not isinstance(v, Tensor) or v.layout != torch.strided or v.is_quantized]
    if others:
        raise UserError(f"{_EXPECTED}; {len(others)} entries are no tensors, the first is {others[0]}")
    claimed = sum(value.numel() * value.element_size() for value in content.values())
    if claimed > 10**6 + unpickle.MAX_SHARING * size:
        raise UserError(f"its tensors claim {claimed:,} bytes, and the file has {size:,}; save each as tensor.clone()")
    broken = [k for k, v in content.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if broken:
        raise UserError(f"{len(broken)} tensors have NaN or infinity ({', '.join(broken[:3])}): it diverged, or is damaged")
    names = {name: name.replace("_orig_mod.", "") for name in content}
    if len(set(names.values())) < len(names):
        raise UserError("it has tensors that differ by _orig_mod. in their names alone")
    return _unwrapped({names[name]: value.detach() for name, value in content.items()})


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop a prefix that all names share if it is a usual one, or if known names are behind it: not DenseNet's `features.`."""
    prefixes = {name.partition(".")[0] for name in tensors}
    if recognise(tensors) is not None or len(prefixes) > 1 or not all("." in name for name in tensors):
        return tensors
    inner = _unwrapped({name.partition(".")[2]: value for name, value in tensors.items()})
    return inner if recognise(inner) is not None or prefixes <= _WRAPPERS else tensors


def _safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safetensors.safe_open(path, "pt") as file:
        facts = dict(file.metadata() or {})
    if facts.get("format") != "fpn_ablate":
        facts = {}
    elif facts.get("version") != VERSION:
        raise UserError(f"of format {facts.get('version')}, and this program reads {VERSION}; export it again")
    return safetensors.torch.load_file(path), facts


def inference_settings(values: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a configuration that decides what a detector computes with given weights, as {dotted key: value}.

    Keys that the configuration lacks, as that of an older run may, are left out.
    """
    task = values["task"]
    groups = {group: values.get(group, {}) for group in ("neck", "rpn", "recipe")}
    groups["task"] = {key: value for key, value in task.items() if not isinstance(value, dict)}
    groups |= {f"task.{part}": value for part, value in task.items() if isinstance(value, dict)}
    chosen = {"neck": [key for key in groups["neck"] if key != "upsample_init"], **INFERENCE}
    return {
        f"{group}.{key}": groups[group][key] for group, keys in chosen.items() for key in keys if key in groups.get(group, {})
    }


def _run_facts(path: Path) -> dict[str, str]:
    """Return facts of a run's weights from its config.yaml and record; none for other files."""
    config, record = path.with_name(CONFIG), path.with_name(RECORD)
    if path.name != MODEL or not config.is_file():
        return {}
    try:
        values = yaml.safe_load(config.read_text(encoding="utf-8"))
        backbone = values["backbone"]
        classes = list((json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}).get("per_class") or {})
        return {
            "backbone": f"timm/{backbone['model']}" if "model" in backbone else backbone.get("class") or backbone["name"],
            "stride_in_1x1": str(backbone.get("stride_in_1x1", False)).lower(),
            "row": values["row"],
            "task": values["task"]["name"],
            "neck": json.dumps(values["neck"], sort_keys=True),
            "settings": json.dumps(inference_settings(values), sort_keys=True),
            **({"classes": json.dumps(classes)} if classes else {}),
        }
    except (*UNREADABLE, yaml.YAMLError) as error:
        raise UserError(
            f"{config.name} or {RECORD} in its folder cannot be read ({first_line(error)}); to do without, rename the weights"
        ) from None


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    """Write a file of our own: tensors under our names, and a header with `facts` and the format's version."""
    content = safetensors.torch.save(_copies(tensors), {**facts, "format": "fpn_ablate", "version": VERSION})
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def write_torch(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a state dict with torch.save."""
    write_atomically(path, lambda temporary: torch.save(_copies(tensors), temporary))


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy the tensors: safetensors refuses those that share memory, and torch would write a view's whole storage."""
    return {name: value.contiguous().clone() for name, value in tensors.items()}

"""Files of weights: what they hold, whatever wrote them; and files of our own.

Nothing in a file is run: torch's are read with weights_only, pickles by `unpickle`, safetensors hold no code.
"""

import argparse
import json
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
from fpn_ablate.utils.files import UNREADABLE, write_atomically
from fpn_ablate.utils.paths import MODEL, RECORD
from fpn_ablate.weights import unpickle

VERSION = "1"  # of our safetensors: raised when names or shapes change their meaning
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch before 1.6
_WANTED = "expected a dictionary of tensors, as torch.save(model.state_dict())"


@dataclass(frozen=True)
class Stored:
    """Tensors under the names of who wrote them, and what the file says of itself (`facts`: text to text)."""

    path: Path
    tensors: dict[str, Tensor]
    facts: dict[str, str] = field(default_factory=dict)


def locate(path: Path) -> Path:
    """The file itself, or model.pt of a run's folder.

    Raises:
        UserError: there is none.
    """
    if path.is_dir():
        if not (path / MODEL).is_file():
            raise UserError(f"{path}: no finished run ({MODEL} is missing); give a run's folder or a file of weights")
        path = path / MODEL
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return path


def read(path: Path) -> Stored:
    """What a file of weights holds, or model.pt of a run's folder with what its config.yaml says.

    Raises:
        UserError: there is no such file, it is damaged, it holds other things than tensors, or it would run something.
    """
    path = locate(path)
    try:
        with path.open("rb") as file:
            head = file.read(len(_OLD_TORCH))
        if head.startswith(_ZIP) or head == _OLD_TORCH:
            with torch.serialization.safe_globals([argparse.Namespace]):  # torchvision's training keeps its arguments
                content, facts = torch.load(path, weights_only=True, map_location="cpu"), _of_run(path)
        elif head.startswith(_PICKLE):
            content = unpickle.read(path.read_bytes())
            facts = {"pickled": "true", "author": str(content.get("__author__", "")) if isinstance(content, dict) else ""}
        elif head[8:9] == b"{":
            content, facts = _safetensors(path)
        else:
            raise ValueError("neither torch's format, nor safetensors, nor a pickle")
        return Stored(path, _tensors(content), facts)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # of any kind: three readers meet whatever a file holds
        reason = first_line(error)
        if reason.startswith("Weights only load failed"):  # torch goes on to advise reading it without that guard
            reason = "damaged, or it holds more than tensors and would have to be run: save model.state_dict()"
        raise UserError(f"{path}: not a readable state dict ({reason})") from None


def _tensors(content: Any) -> dict[str, Tensor]:
    """The dictionary of tensors in `content`, or below its key "model" (detectron2, torchvision's training) or "blobs"."""
    for key in ("model", "blobs"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if isinstance(content, dict):
        content = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in content.items()}
    if not isinstance(content, dict) or not content or not all(isinstance(k, str) for k in content):
        raise UserError(_WANTED)
    wrong = [k for k, v in content.items() if not isinstance(v, Tensor) or v.layout != torch.strided or v.is_quantized]
    if wrong:
        raise UserError(f"{_WANTED}; {wrong[0]} is none, of {len(wrong)} such")
    broken = [k for k, v in content.items() if v.is_floating_point() and not torch.isfinite(v).all()]
    if broken:
        raise UserError(f"{len(broken)} tensors hold what is no number ({', '.join(broken[:3])}): it diverged, or is damaged")
    # DistributedDataParallel puts its own name in front.
    return {k.removeprefix("module."): v.detach() for k, v in content.items()}


def _safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safetensors.safe_open(path, "pt") as file:
        facts = dict(file.metadata() or {})
    if facts.get("format") != "fpn_ablate":
        facts = {}
    elif facts.get("version") != VERSION:
        raise UserError(f"of format {facts.get('version')}, and this program reads {VERSION}; export it anew")
    return safetensors.torch.load_file(path), facts


def computed_with(values: dict[str, Any]) -> dict[str, Any]:
    """Of a configuration, what decides what a detector's weights compute: {dotted key: value}."""
    wanted = {
        "neck": None,
        "rpn": ("anchor_sizes", "anchor_ratios", "anchor_grid"),
        "recipe": ("short_side", "max_side", "antialias"),
    }
    groups = {group: [key for key in keys or values[group] if key in values[group]] for group, keys in wanted.items()}
    found = {f"{group}.{key}": values[group][key] for group, keys in groups.items() for key in keys}  # an older run has fewer
    pooled = (
        "pooling",
        "sampling_ratio",
        "resolution",
        "conv5_resolution",
        "canonical_level",
        "canonical_box_size",
        "box_weights",
    )
    roi = values["task"].get("roi") or {}
    return found | {f"task.roi.{key}": roi[key] for key in pooled if key in roi}


def _of_run(path: Path) -> dict[str, str]:
    """What the configuration beside a run's weights says of them."""
    beside = path.with_name("config.yaml")
    if path.name != MODEL or not beside.is_file():
        return {}
    try:
        values = yaml.safe_load(beside.read_text(encoding="utf-8"))
        backbone = values["backbone"]
        known = path.with_name(RECORD)
        classes = list((json.loads(known.read_text(encoding="utf-8")) if known.is_file() else {}).get("per_class") or {})
        return {
            "backbone": f"timm/{backbone['model']}" if backbone["name"] == "timm" else backbone["name"],
            "stride_in_1x1": str(backbone.get("stride_in_1x1", False)).lower(),
            "row": values["row"],
            "task": values["task"]["name"],
            "neck": json.dumps(values["neck"], sort_keys=True),
            "settings": json.dumps(computed_with(values), sort_keys=True),
            **({"classes": json.dumps(classes)} if classes else {}),
        }
    except (*UNREADABLE, yaml.YAMLError):
        raise UserError(
            f"{beside.name} or {RECORD} beside it cannot be read; give the file under another name to do without it"
        ) from None


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    """Our own file: tensors under our names, `facts` and the format's version in its header."""
    header = {**facts, "format": "fpn_ablate", "version": VERSION}
    # A copy of each: safetensors refuses tensors that share their memory.
    whole = {name: value.contiguous().clone() for name, value in tensors.items()}
    write_atomically(path, lambda temporary: temporary.write_bytes(safetensors.torch.save(whole, header)))


def write_torch(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A state dict as torch.save writes it."""
    whole = {name: value.contiguous().clone() for name, value in tensors.items()}
    write_atomically(path, lambda temporary: torch.save(whole, temporary))

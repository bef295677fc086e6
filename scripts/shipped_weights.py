#!/usr/bin/env python3
"""Make the weights that ship with the package anew: the `small` backbone, pre-trained as backbone.weights=pretrain does.

    python scripts/shipped_weights.py [key=value ...]

The recipe is `quick`, whose `short_side` sets the size of things and whose `pretrain` the rest, on one thread and one process
that draws the pictures: about 3 minutes on two cores. It replaces small.safetensors and small.json in
fpn_ablate/weights/shipped.
"""

import hashlib
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fpn_ablate.config.composition import compose
from fpn_ablate.data.shapes import RENDERER
from fpn_ablate.engine.inputs import world
from fpn_ablate.engine.pretrain import load_or_pretrain
from fpn_ablate.runs.environment import device_name
from fpn_ablate.utils.files import save_text
from fpn_ablate.utils.seeding import set_deterministic
from fpn_ablate.utils.threads import num_threads
from fpn_ablate.weights.files import read, write_safetensors
from fpn_ablate.weights.shipped import SHIPPED


def make(target: Path, arguments: Sequence[str] = ()) -> Path:
    """Pre-train the backbone that `arguments` configure, and write its weights and their description to the folder `target`."""
    cfg = compose(("backbone=small", "backbone.weights=pretrain", "recipe=quick", "threads=1", *arguments))
    device, pictures = torch.device("cpu"), world(cfg.data, cfg.recipe.short_side)
    set_deterministic(True)
    with tempfile.TemporaryDirectory() as folder, num_threads(cfg.threads):
        made = load_or_pretrain(cfg.backbone, cfg.recipe.pretrain, pictures, Path(folder), device, cfg.workers)
        tensors, facts = read(made.path).tensors, json.loads(made.path.with_suffix(".json").read_text())
    path = target / f"{cfg.backbone.label}.safetensors"
    write_safetensors(path, tensors, {"backbone": cfg.backbone.label})
    describe(path, facts | {"threads": cfg.threads, "device": device_name(device), "torch": torch.__version__})
    return path


def describe(path: Path, facts: Mapping[str, Any]) -> None:
    """Write the description of the weights `path`: their sha256, RENDERER and `facts`, without the seconds of one machine."""
    facts = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), **facts, "renderer": RENDERER}
    facts.pop("seconds", None)
    save_text(path.with_suffix(".json"), json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    print(f"written: {make(SHIPPED, sys.argv[1:])}")

"""What several test files share: configurations composed as the command line composes them, and the measuring scripts."""

import functools
import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from fpn_ablate.__main__ import _introduce
from fpn_ablate.paths import CONF
from fpn_ablate.report import live
from fpn_ablate.schema import Config
from fpn_ablate.sweep import cell_config

os.environ["WANDB_MODE"] = "disabled"  # test_wandb.py switches it on
os.environ.setdefault(live.SWITCH, "off")  # a page takes seconds; the tests of the page take this back

sys.path.append(str(Path(__file__).parent / "data"))  # for coco_sets

ROWS = ("c4", "c5", "fpn", "bottom_up", "no_lateral", "finest")
# A backbone that needs no pre-training; every part of it is trained.
SCRATCH = ("backbone.weights=none", "backbone.freeze_at=0", "backbone.frozen_bn=false")


@functools.cache
def composed(*overrides: str) -> Config:
    _introduce()
    chosen = dict(o.split("=", 1) for o in overrides)
    overrides = ("recipe=smoke", *overrides) if "recipe" not in chosen else overrides
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return cell_config(compose("config", list(overrides)), {"ablation": chosen.get("ablation", "fpn")}, overrides)


@pytest.fixture(scope="session")
def config():
    """`config("ablation=c4", "neck.smooth=none")` -> a validated Config; recipe=smoke unless told otherwise."""
    return composed


@pytest.fixture(scope="session")
def script():
    """`script("bench")` -> scripts/bench.py as a module."""

    def load(name):
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "scripts" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)

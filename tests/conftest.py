"""What several test files share: configurations composed as the command line composes them, and the measuring scripts."""

import functools
import importlib.util
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here or by the processes that tests start

import pytest
import torch
from hydra import compose, initialize_config_dir

from fpn_ablate.config.composition import cell_config, register
from fpn_ablate.config.schema import Config
from fpn_ablate.report.html import live
from fpn_ablate.utils.paths import CONF

os.environ["WANDB_MODE"] = "disabled"  # test_wandb.py switches it on
os.environ.setdefault(live.SWITCH, "off")  # a page takes seconds; the tests of the page take this back

sys.path.append(str(Path(__file__).parent / "data"))  # for coco_sets
sys.path.append(str(Path(__file__).parents[1] / "scripts"))  # for fuzzing

WORKERS = 4  # each holds torch and what its tests make: up to 2 GB

ROWS = ("c4", "c5", "fpn", "bottom_up", "no_lateral", "finest")
# A backbone that needs no pre-training; every part of it is trained.
SCRATCH = ("backbone.weights=none", "backbone.freeze_at=0", "backbone.frozen_bn=false")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Processes for `-n auto` of pyproject.toml: one a core, up to WORKERS.

    None (0), and so in pytest's own process: on one core; where files or tests are chosen, as a second process would load torch
    for longer than they take; the GPU's tests; with --capture=no, which shows nothing of other processes.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    chosen = config.option.keyword or not all(Path(argument).is_dir() for argument in config.args)
    if cores == 1 or chosen or "gpu" in config.option.markexpr.replace("not gpu", "") or config.option.capture == "no":
        return 0
    return min(cores, WORKERS)


@functools.cache
def composed(*overrides: str) -> Config:
    register()
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

"""In how many processes the tests run, and where their fixtures are: helpers/shared_fixtures.py."""

import gc
import os
import signal
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here or by the processes that tests start
os.environ["WANDB_MODE"] = "disabled"  # test_wandb.py switches it on
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell starts what it runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

sys.path.append(str(Path(__file__).parent / "helpers"))
sys.path.append(str(Path(__file__).parents[1] / "scripts" / "drills"))  # for fuzzing

WORKERS = 4  # each holds torch and what its tests make: up to 2 GB


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


def pytest_configure(config: pytest.Config) -> None:
    """Load the fixtures, and torch with them, which takes seconds, but not in a process that only hands the tests out."""
    shows = config.option.collectonly or config.option.showfixtures  # in this process, whatever -n says
    if shows or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("shared_fixtures")


def pytest_collection_finish() -> None:
    """Collect garbage less often, and never among what is loaded by now: that took a tenth of the time."""
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


def pytest_unconfigure() -> None:
    gc.unfreeze()  # libraries tell of what is left at the end

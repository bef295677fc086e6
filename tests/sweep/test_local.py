"""How many rows of a sweep run at once; tests/project/test_packaging.py runs two."""

import pytest
import torch

from fpn_ablate.sweep import local
from fpn_ablate.sweep.local import rows_at_once


@pytest.fixture
def machine(monkeypatch):
    """`machine(cores=8, gib=64, gpu=False)` -> the machine is such a one."""

    def set_up(cores: int, gib: float, gpu: bool = False) -> None:
        monkeypatch.setattr("joblib.cpu_count", lambda: cores)
        monkeypatch.setattr(local.os, "sysconf", lambda key: 2**12 if key == "SC_PAGE_SIZE" else int(gib * 2**18))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)

    return set_up


@pytest.mark.parametrize(
    ("cores", "gib", "gpu", "rows", "overrides", "expected"),
    [
        (8, 64, False, 6, [], 6),
        (4, 64, False, 6, [], 4),
        (8, 9, False, 6, [], 2),  # memory
        (8, 1, False, 6, [], 1),
        (8, 64, False, 6, ["threads=4"], 2),
        (2, 64, False, 6, ["threads=4"], 1),
        (8, 64, False, 6, ["gpus=2", "recipe.accumulate=2"], 4),  # on a CPU: processes
        (8, 64, True, 6, [], 1),
        (8, 64, True, 6, ["device=cpu"], 6),
        (8, 64, False, 1, [], 1),
        (1, 1, True, 6, ["jobs=3"], 3),
        (8, 64, False, 2, ["jobs=3"], 2),
    ],
)
def test_as_many_rows_run_at_once_as_device_cores_and_memory_allow(machine, config, cores, gib, gpu, rows, overrides, expected):
    machine(cores, gib, gpu)
    assert rows_at_once([config(*overrides)] * rows) == expected

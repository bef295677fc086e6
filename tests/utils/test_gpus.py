"""GPUs that processes of a host claim; a GPU is no more than its name here."""

import os
import subprocess
import sys
from contextlib import ExitStack, contextmanager

import pytest

from fpn_ablate.utils import gpus

CODE = """
import os, sys
from fpn_ablate.utils.gpus import claim_gpus
for count in sys.argv[1:]:
    claim_gpus(int(count))
print(os.environ.get("CUDA_VISIBLE_DEVICES"), "torch" in sys.modules, flush=True)
input()
"""


@pytest.fixture
def names(tmp_path):
    """Four GPUs that only this test knows."""
    return [f"GPU-{tmp_path.name}-{os.getpid()}-{number}" for number in range(4)]


@contextmanager
def process(visible, *counts):
    """A process that claims GPUs; yields what CUDA_VISIBLE_DEVICES then names, what was printed, and the process."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(visible)}
    command = [sys.executable, "-c", CODE, *map(str, counts or [1])]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        lines = []
        while not lines or not lines[-1].endswith("False\n"):
            lines.append(child.stdout.readline())
            assert lines[-1], "ended"
        yield lines[-1].split()[0].split(","), "".join(lines[:-1]), child
        child.kill()


def test_each_process_has_a_gpu_of_its_own_and_a_killed_one_frees_it(names, monkeypatch):
    with ExitStack() as stack:
        started = [stack.enter_context(process(names)) for _ in names]
        claimed = [gpu for gpu, *_ in started]
        assert sorted(claimed) == [[name] for name in names]
        assert all(f"on GPU {gpu}\n" in printed for (gpu,), printed, _ in started)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(names))
        assert gpus.free_gpus() == []
        (freed,), _, third = started[2]
        third.kill()
        third.wait()
        assert gpus.free_gpus() == [freed] == gpus.free_gpus()
        assert stack.enter_context(process(names))[0] == [freed]


def test_more_processes_than_gpus_share_them_evenly_and_say_so(names):
    with ExitStack() as stack:
        started = [stack.enter_context(process(names[:2])) for _ in range(4)]
        assert sorted(gpu for (gpu,), *_ in started) == sorted(names[:2] * 2)
        assert ["which 1 more use, as none is free" in printed for _, printed, _ in started] == [False, False, True, True]


def test_a_process_may_have_several_and_what_is_assigned_is_kept(names):
    """As a job of SLURM or Ray, which sees no others: whoever chooses then takes another one."""
    with process(names[:1]) as (kept, printed, _), process(names, 1, 3) as (several, *_):
        assert (kept, printed) == (names[:1], "")
        assert several == names[1:]
        with process(names[:2], 4) as (all_there_are, *_):
            assert all_there_are == names[:2]


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        ("0,1", ["0", "1"]),
        (" 3 , GPU-8932f9", ["3", "GPU-8932f9"]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("2,-1,1", ["2"]),
    ],
)
def test_gpus_are_visible_as_cuda_reads_the_variable(monkeypatch, variable, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert gpus.visible_gpus() == expected


def test_without_a_gpu_nothing_happens(monkeypatch):
    with process([]) as (visible, printed, _):
        assert (visible, printed) == (["False"], "")

"""Rows of a sweep that run at once: how many, and what becomes of one whose process is killed."""

import os
import signal
import time

import pytest
import torch
from hydra.core.utils import JobReturn, JobStatus
from hydra_plugins.hydra_joblib_launcher import _core

from fpn_ablate.sweep import local
from fpn_ablate.sweep.jobs import WorkerKilled
from fpn_ablate.sweep.local import LocalLauncher, rows_at_once
from fpn_ablate.utils import signals


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


@pytest.mark.parametrize(
    ("free", "rows", "overrides", "n_jobs", "expected"),
    [
        (["1", "3"], 6, [], -1, 2),  # two of four: other jobs have the others
        ([], 6, [], -1, 1),
        (["1", "3"], 1, [], -1, 1),
        (["1", "3"], 6, ["device=cuda"], -1, 2),
        (["1", "3"], 6, ["device=cpu"], -1, 5),
        (["1", "3"], 6, ["jobs=3"], -1, 3),
        (["1", "3"], 6, ["jobs=3"], 4, 4),  # hydra.launcher.n_jobs
    ],
)
def test_on_each_free_gpu_runs_one_row(machine, config, monkeypatch, free, rows, overrides, n_jobs, expected):
    machine(5, 64)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("from here on torch would not heed a claim"))
    monkeypatch.setattr(local, "visible_gpus", lambda: ["0", "1", "2", "3"])
    monkeypatch.setattr(local, "free_gpus", lambda: free)
    assert rows_at_once([config(*overrides)] * rows, n_jobs) == expected


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """`launch(names)` -> the returns of jobs that run two at once, in processes that run no Hydra."""

    def execute(number, job, *hydra):  # in a process of its own; sent there by value
        (name,), log = job, tmp_path / "log.txt"

        def tell(what):
            with log.open("a") as file:
                file.write(f"{name} {what} {os.getpid()}\n")

        tell("begins")
        if name == "killed" or (name == "killed-once" and log.read_text().count(name) == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        awaited = {"slow": "d ends", "beside": "signalled ends"}.get(name, "")
        while awaited not in log.read_text():
            time.sleep(0.01)
        if name == "signalled":
            os.kill(os.getppid(), signal.SIGTERM)
        tell("ends")
        job_return = JobReturn(overrides=job, status=JobStatus.COMPLETED)
        job_return.return_value = number
        return job_return

    monkeypatch.setattr(_core, "execute_job", execute)

    def launch(*names):
        launcher = LocalLauncher(dict.fromkeys(("hydra_context", "config", "task_function")))
        launcher.jobs = 2
        return launcher.launch([[name] for name in names], 7)

    return launch


def lines(tmp_path):
    return [line.split() for line in (tmp_path / "log.txt").read_text().splitlines()]


def test_a_killed_process_costs_its_row_alone_which_is_then_tried_with_no_other(launch, tmp_path, capsys):
    """The row beside it goes on in its process, and so do the others, two at once."""
    returns = launch("slow", "killed", "killed-once", "c", "d")
    assert [job_return.overrides for job_return in returns] == [["slow"], ["killed"], ["killed-once"], ["c"], ["d"]]
    assert [getattr(job_return, "_return_value", None) for job_return in returns[::2]] == [7, 9, 11]
    assert isinstance(returns[1]._return_value, WorkerKilled) and returns[1].status == JobStatus.FAILED
    told = lines(tmp_path)
    assert [line[0] for line in told].count("slow") == 2  # it began once, and ended
    names = [f"{name} {what}" for name, what, _ in told]
    assert names.index("slow ends") > names.index("d ends")  # beside all others
    assert names[-3:] == ["killed begins", "killed-once begins", "killed-once ends"]
    assert capsys.readouterr().err.splitlines() == [
        f"a worker was killed: retrying {name} alone" for name in ("killed", "killed-once")
    ]


def test_after_a_signal_the_rows_that_run_end_and_no_other_begins(launch, tmp_path, monkeypatch):
    monkeypatch.setattr(signals.multiprocessing, "active_children", lambda: [])  # no SIGTERM to the jobs here
    with pytest.raises(signals.Stopped), signals.handling_signals(), signals.defer_interrupts():
        launch("signalled", "beside", "c")
    assert sorted(line[:2] for line in lines(tmp_path)) == [
        [name, what] for name in ("beside", "signalled") for what in ("begins", "ends")
    ]


def test_a_process_serves_several_rows_and_each_row_that_runs_at_once_has_its_own(launch, tmp_path):
    launch("slow", "a", "b", "c", "d")
    process = {name: number for name, what, number in lines(tmp_path)}
    assert process["slow"] != process["a"] == process["b"] == process["c"] == process["d"]

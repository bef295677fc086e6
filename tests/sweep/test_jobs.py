"""The jobs of a sweep: one that fails, one whose process is killed, and what is kept of them."""

import gc
import signal
import subprocess
import sys
import weakref
from concurrent.futures.process import BrokenProcessPool

import pytest
from hydra.core.utils import JobReturn, JobStatus

from fpn_ablate.sweep import jobs
from fpn_ablate.sweep.jobs import NotStarted, RetryingLauncher, WorkerKilled, job_scope
from fpn_ablate.utils import signals
from fpn_ablate.utils.signals import Stopped


@pytest.fixture
def stop_file(tmp_path, monkeypatch):
    monkeypatch.setenv(jobs.STOP, str(tmp_path / "plan.stop"))
    return tmp_path / "plan.stop"


class Launcher:
    """In place of joblib's: jobs that are named `killed...` take the pool with them, the first time or always.

    The cells are the jobs' names.
    """

    def __init__(self):
        self.calls, self.once, self.ended = [], {"killed-once"}, set()

    def launch(self, overrides, initial_job_idx):
        self.calls.append([job[0] for job in overrides])
        for (job,) in overrides:
            if job == "killed" or job in self.once:
                self.once -= {job}
                raise BrokenProcessPool
            self.ended |= {job} - {"slow"}  # whose neighbour is killed
        return [self._return(job) for (job,) in overrides]

    def _return(self, job):
        found = JobReturn(overrides=[job], status=JobStatus.FAILED if job == "failing" else JobStatus.COMPLETED)
        found.return_value = ValueError("no") if job == "failing" else None
        return found


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """`launch(names)` -> the launcher that has launched them, Hydra's below it, and the returns."""

    def launch(names, first=0, plain=None, stop=False):
        plain, cells = plain or Launcher(), [None] * first + names
        monkeypatch.setattr(jobs, "has_ended", lambda cell: cell in plain.ended)
        launcher = RetryingLauncher(plain, cells, tmp_path / "plan.stop")
        launcher.stop = stop
        return launcher, plain, launcher.launch([[name] for name in names], first)

    return launch


@pytest.mark.parametrize("first", [0, 7])  # of Hydra's batches
def test_a_killed_job_is_tried_again_alone_and_the_others_go_on(launch, first, monkeypatch, capsys):
    told = []
    monkeypatch.setattr(jobs, "mark_killed", lambda *what: told.append(what))
    names = ["a", "slow", "killed", "b", "killed-once", "failing", "c"]
    launcher, plain, returns = launch(names, first)
    assert [found.overrides[0] for found in returns] == names
    assert {found.status for found in returns} == {JobStatus.COMPLETED}  # or Hydra would begin no other batch
    assert plain.calls == [
        names,
        ["slow"],
        ["a", "killed", "b", "killed-once", "failing", "c"],
        ["killed"],
        ["a", "b", "killed-once", "failing", "c"],
        ["killed-once"],
        ["a", "b", "failing", "c"],
    ]
    assert [cell for cell, _ in told] == ["killed"] and "was killed, alone too" in told[0][1]
    failures = [("killed", WorkerKilled), ("failing", ValueError)]
    assert [(found.overrides[0], type(found._return_value)) for found in launcher.failed] == failures
    with pytest.raises(WorkerKilled, match="its process was killed"):
        launcher.raise_first_failure()
    err = capsys.readouterr().err
    assert "failed: killed: WorkerKilled" in err and "failed: failing: ValueError: no" in err


def test_with_stop_hydra_hears_of_the_failure_and_no_other_begins(launch, monkeypatch):
    monkeypatch.setattr(jobs, "mark_killed", lambda *_: None)
    _, plain, returns = launch(["killed", "a"], stop=True)
    assert [found.status for found in returns] == [JobStatus.FAILED]
    assert plain.calls == [["killed", "a"], ["killed"]]


def test_a_pool_whose_workers_never_begin_is_not_tried_for_ever(launch, monkeypatch):
    class Broken(Launcher):
        def launch(self, overrides, initial_job_idx):
            self.calls.append(1)
            raise BrokenProcessPool

    monkeypatch.setattr(jobs, "mark_killed", lambda *_: None)
    launcher, plain, _ = launch(["a", "b"], plain=Broken())
    assert len(plain.calls) == 4 and len(launcher.failed) == 2


def test_after_a_failure_none_begins_where_that_is_asked_for(stop_file):
    with pytest.raises(ValueError), job_scope("continue"):
        raise ValueError
    with job_scope("continue"):
        pass
    with pytest.raises(ValueError), job_scope("stop"):
        raise ValueError("no")
    with pytest.raises(NotStarted, match=r"on_failure=stop.*\(ValueError: no\)"), job_scope("stop"):
        pytest.fail("begun")


def test_no_job_begins_after_a_signal():
    with pytest.raises(Stopped), signals.handling_signals():
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGTERM)
        with job_scope("continue"):
            pytest.fail("begun")


def test_a_job_that_is_not_to_begin_does_not_load_torch(stop_file, tmp_path):
    """Which takes seconds: a sweep that a signal ends waits for the jobs that workers of joblib have already been given."""
    stop_file.touch()
    code = (
        "import sys\nfrom fpn_ablate.cli.main import main\n"
        "try: main(['recipe=smoke', 'log.wandb=disabled'])\nfinally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "not started: on_failure=stop" in done.stderr
    assert done.stdout.splitlines()[-1] == "False"


class Network:
    pass


@pytest.mark.parametrize("outer", [RuntimeError, Stopped])
def test_what_a_job_held_that_failed_or_was_stopped_is_free(outer):
    """Hydra keeps an error until the sweep ends: what its frames hold is a GPU's memory, or processes that load images."""
    held = []

    def train():
        network = Network()
        held.append(weakref.ref(network))
        raise ValueError("inner")

    def job():
        try:
            train()
        except ValueError as error:
            raise outer(15) from error

    with pytest.raises(outer, match="15") as kept, job_scope("continue"):
        job()
    gc.collect()
    assert kept.value.__traceback__ and held[0]() is None

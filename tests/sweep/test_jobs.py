"""The jobs of a sweep: one that fails, one whose process is killed, and what is kept of them."""

import gc
import os
import subprocess
import sys
import weakref
from concurrent.futures.process import BrokenProcessPool

import pytest
from hydra.core.utils import JobReturn, JobStatus

from fpn_ablate.sweep import jobs
from fpn_ablate.sweep.jobs import NotStarted, RetryingLauncher, WorkerKilled, job_scope
from fpn_ablate.utils.signals import Stopped


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(jobs.FOLDER_VARIABLE, str(tmp_path / "jobs"))
    monkeypatch.setenv(jobs.SWEEP_VARIABLE, str(os.getpid()))
    return tmp_path / "jobs"


class Launcher:
    """In place of joblib's: jobs that are named `killed...` take the pool with them, the first time or always."""

    def __init__(self, folder):
        self.folder, self.calls, self.once = folder, [], {"killed-once"}

    def launch(self, overrides, initial_job_idx):
        self.calls.append([job[0] for job in overrides])
        for number, (job,) in enumerate(overrides, start=initial_job_idx):
            if job == "killed" or job in self.once:
                self.once -= {job}
                (self.folder / str(number)).touch()
                if number + 1 < initial_job_idx + len(overrides):
                    (self.folder / str(number + 1)).touch()  # its neighbour goes with it
                raise BrokenProcessPool
        return [self._of(job) for (job,) in overrides]

    def _of(self, job):
        found = JobReturn(overrides=[job], status=JobStatus.FAILED if job == "failing" else JobStatus.COMPLETED)
        found.return_value = ValueError("no") if job == "failing" else None
        return found


def test_a_killed_job_is_tried_again_alone_and_the_others_go_on(tmp_path, capsys):
    plain, told = Launcher(tmp_path / "jobs"), []
    launcher = RetryingLauncher(plain, tmp_path / "jobs", lambda *what: told.append(what))
    names = ["a", "killed", "b", "killed-once", "failing", "c"]
    returns = launcher.launch([[name] for name in names], 0)
    assert [found.overrides[0] for found in returns] == names
    assert {found.status for found in returns} == {JobStatus.COMPLETED}  # or Hydra would begin no other batch
    alone = [["killed"], ["b"]], [["killed-once"], ["failing"]]
    assert plain.calls == [names, *alone[0], ["a", "killed-once", "failing", "c"], *alone[1], ["a", "c"]]
    assert [number for number, _ in told] == [1] and "killed twice" in told[0][1]
    assert [(f.overrides[0], type(f._return_value)) for f in launcher.failed] == [
        ("killed", WorkerKilled),
        ("failing", ValueError),
    ]
    with pytest.raises(WorkerKilled, match="its process was killed twice"):
        launcher.raise_first_failure()
    err = capsys.readouterr().err
    assert "failed: killed: WorkerKilled" in err and "failed: failing: ValueError: no" in err


class Pool:
    """In place of joblib's, with jobs that are carried out; the returns of all are lost with the process of one."""

    def __init__(self, folder):
        self.folder, self.begun = folder, []

    def launch(self, overrides, initial_job_idx):
        returns = [self._of(job, number) for number, job in enumerate(overrides, start=initial_job_idx)]
        if "killed" in [job[0] for job in overrides]:
            raise BrokenProcessPool
        return returns

    def _of(self, job, number):
        self.begun += job
        found = JobReturn(overrides=job, status=JobStatus.COMPLETED)
        found.return_value = None
        try:
            with job_scope(number, "continue"):
                if job[0].startswith("failing"):
                    raise ValueError(job[0])
        except ValueError as error:
            found.status, found.return_value = JobStatus.FAILED, error
        if job == ["killed"]:
            (self.folder / str(number)).touch()
        return found


@pytest.mark.parametrize("first", [0, 7])  # of Hydra's batches
def test_a_job_that_has_failed_is_not_begun_again_because_its_neighbour_is_killed(folder, first, capsys):
    launcher = RetryingLauncher(pool := Pool(folder), folder)
    names = ["a", "failing", "killed", "failing-too", "b"]
    returns = launcher.launch([[name] for name in names], first)
    assert [found.overrides[0] for found in returns] == names
    assert pool.begun == [*names, "killed", "a", "b"]
    told = [(found.overrides[0], str(found._return_value)) for found in launcher.failed if found.overrides != ["killed"]]
    assert told == [("failing", "ValueError: failing"), ("failing-too", "ValueError: failing-too")]
    with pytest.raises(jobs.Failed):
        launcher.raise_first_failure()
    assert "failed: failing: ValueError: failing\n" in capsys.readouterr().err


def test_with_stop_hydra_hears_of_the_failure_and_no_other_begins(tmp_path):
    launcher = RetryingLauncher(Launcher(tmp_path / "jobs"), tmp_path / "jobs")
    launcher.stop = True
    returns = launcher.launch([["a"], ["killed"]], 0)
    assert [found.status for found in returns] == [JobStatus.COMPLETED, JobStatus.FAILED]
    assert (tmp_path / "jobs" / jobs.STOP).exists()


def test_a_pool_that_breaks_before_any_job_is_no_jobs_fault(tmp_path):
    class Broken(Launcher):
        def launch(self, *_, **__):
            calls.append(1)
            raise BrokenProcessPool

    calls = []
    with pytest.raises(BrokenProcessPool):
        RetryingLauncher(Broken(tmp_path / "jobs"), tmp_path / "jobs").launch([["a"]], 0)
    assert len(calls) == 3  # it is tried again, but not for ever


def test_a_job_is_marked_while_it_is_under_way(folder):
    with job_scope(3, "continue"):
        assert [file.name for file in folder.iterdir()] == ["3"]
    with pytest.raises(ValueError), job_scope(4, "continue"):
        raise ValueError
    assert [file.name for file in folder.iterdir()] == ["4.failed"]
    with job_scope(5, "continue"):
        pass  # the failure of one stops no other


def test_after_a_failure_none_begins_where_that_is_asked_for(folder):
    with pytest.raises(ValueError), job_scope(0, "stop"):
        raise ValueError
    with pytest.raises(NotStarted, match="on_failure=stop"), job_scope(1, "stop"):
        pytest.fail("begun")


def test_a_job_that_is_not_to_begin_does_not_load_torch(folder, tmp_path):
    """Which takes seconds: a sweep that a signal ends waits for the jobs that workers of joblib have already been given."""
    folder.mkdir()
    (folder / jobs.STOP).touch()
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
def test_what_a_job_held_that_failed_or_was_stopped_is_free(folder, outer):
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

    with pytest.raises(outer, match="15") as kept, job_scope(0, "continue"):
        job()
    gc.collect()
    assert kept.value.__traceback__ and held[0]() is None

"""The jobs of a sweep: one that fails, one whose process is killed, and what is kept of them."""

import gc
import re
import signal
import subprocess
import sys
import time
import weakref
from contextlib import suppress
from pathlib import Path

import pytest
from hydra.core.utils import JobReturn, JobStatus

from fpn_ablate.sweep import jobs
from fpn_ablate.sweep.checks import HydraUserError, as_hydra_error
from fpn_ablate.sweep.jobs import Deferred, NotStarted, RetryingLauncher, WorkerKilled, failed_return, job_scope
from fpn_ablate.utils import signals
from fpn_ablate.utils.errors import RankFailed, UserError
from fpn_ablate.utils.locks import is_free, lock
from fpn_ablate.utils.signals import Stopped


@pytest.fixture
def stop_file(tmp_path, monkeypatch):
    monkeypatch.setenv(jobs.STOP, str(tmp_path / "plan.stop"))
    return tmp_path / "plan.stop"


class Launcher:
    """In place of Hydra's: a job named `held...` is deferred while its lock is, `killed` loses its process, `failing` fails."""

    def __init__(self, tmp_path):
        self.calls, self.folder = [], tmp_path

    def launch(self, overrides, initial_job_idx):
        self.calls.append([" ".join(job) for job in overrides])
        return [self._return(job) for job in overrides]

    def _return(self, job):
        if job[0] == "killed":
            return failed_return(job, WorkerKilled("its process was killed"))
        found = JobReturn(overrides=job, status=JobStatus.FAILED if job[0] == "failing" else JobStatus.COMPLETED)
        found.return_value = ValueError("no") if job[0] == "failing" else None
        if job[0].startswith("held") and not is_free(self.folder / job[0]):
            found.return_value = Deferred(str(self.folder / job[0]), job[0])
        return found


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """`launch(names)` -> the launcher that has launched them, Hydra's below it, and the returns. The cells are the names."""

    def launch(names, first=0, stop=False, shared=()):
        plain, cells = Launcher(tmp_path), {(name,): name for name in names}
        monkeypatch.setattr(jobs, "sources_of", lambda cell: {"rpn": f"source of {cell}"})
        monkeypatch.setattr(jobs, "shared_sources", lambda cells: [n for n, name in cells.items() if name in shared])
        launcher = RetryingLauncher(plain, cells, tmp_path / "plan.stop")
        launcher.stop = stop
        return launcher, plain, launcher.launch([[name] for name in names], first)

    return launch


@pytest.mark.parametrize("first", [0, 7])  # of Hydra's batches
def test_a_job_that_fails_or_whose_process_was_lost_costs_its_row_alone(launch, first, monkeypatch, capsys):
    told = []
    monkeypatch.setattr(jobs, "mark_killed", lambda *what: told.append(what))
    names = ["a", "killed", "b", "failing", "c"]
    launcher, plain, returns = launch(names, first)
    assert [found.overrides[0] for found in returns] == names
    assert {found.status for found in returns} == {JobStatus.COMPLETED}  # or Hydra would begin no other batch
    assert plain.calls == [names]
    reason = "WorkerKilled: its process was killed"
    assert told == [("killed", reason), ("source of killed", reason)]
    failures = [("killed", WorkerKilled), ("failing", ValueError)]
    assert [(found.overrides[0], type(found._return_value)) for found in launcher.failed] == failures
    error = launcher.failed[-1]._return_value
    error.add_note("traceback of failing: error.txt")
    with pytest.raises(SystemExit, match="1"):  # an error of another process has no traceback here
        launcher.raise_first_failure()
    assert capsys.readouterr().err.splitlines() == [
        "failed: killed: WorkerKilled: its process was killed",
        "failed: failing: ValueError: no",
        "traceback of failing: error.txt",
    ]
    with suppress(ValueError):
        raise error
    with pytest.raises(ValueError, match="no"):
        launcher.raise_first_failure()


def test_bad_input_that_several_rows_have_in_common_is_told_once(launch, capsys):
    launcher, *_ = launch([])
    bad = HydraUserError("train: 2 problems")
    launcher.failed = [failed_return([f"ablation={row}", "++data.root=x"], bad) for row in ("c4", "fpn")]
    with pytest.raises(SystemExit, match="1"):
        launcher.raise_first_failure()
    assert capsys.readouterr().err == "failed: ablation=c4; ablation=fpn: train: 2 problems\n"
    launcher.failed = launcher.failed[:1] * 2  # the same row twice
    with pytest.raises(SystemExit, match="1"):
        launcher.raise_first_failure()
    assert capsys.readouterr().err == "failed: ablation=c4 data.root=x: train: 2 problems\n"


def test_with_stop_hydra_hears_of_the_failure_and_what_is_deferred_is_not_waited_for(launch, tmp_path):
    with lock(tmp_path / "held"):
        _, plain, returns = launch(["failing", "held", "a"], stop=True)
    assert [found.status for found in returns] == [JobStatus.FAILED, JobStatus.COMPLETED]
    assert plain.calls == [["failing", "held", "a"]]


def test_what_several_rows_build_on_is_launched_first_and_by_itself(launch):
    _, plain, returns = launch(["a", "b", "c"], shared=["b"])
    assert plain.calls == [[f"b {jobs.ONLY_SOURCES}"], ["a", "b", "c"]]
    assert [found.overrides for found in returns] == [["a"], ["b"], ["c"]]


def test_a_job_whose_lock_is_held_is_launched_again_behind_all_others_once_it_is_free(launch, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jobs, "POLL", 0.01)
    taken = {name: lock(tmp_path / name) for name in ("held-long", "held-short")}
    for held in taken.values():
        held.acquire()
    waits = iter(["held-short", None, "held-long"])
    monkeypatch.setattr(jobs.time, "sleep", lambda _: (name := next(waits)) and taken[name].release())
    _, plain, returns = launch(["held-long", "a", "held-short", "b"])
    assert plain.calls == [["held-long", "a", "held-short", "b"], ["held-short"], ["held-long"]]
    assert [(found.overrides[0], found._return_value) for found in returns] == [
        *[("held-long", None), ("a", None), ("held-short", None), ("b", None)]
    ]
    waiting = [line for line in capsys.readouterr().err.splitlines() if "waiting" in line]
    assert waiting == [
        "held-long (and 1 more): another row or process is working on it; waiting",
        "held-long: another row or process is working on it; waiting",
    ]


def test_a_signal_ends_the_wait_for_a_lock(launch, tmp_path, monkeypatch):
    """Also where its handler does not raise, as while workers run."""
    naps = iter([signal.SIGTERM])
    monkeypatch.setattr(jobs.time, "sleep", lambda _: signal.raise_signal(next(naps)))
    with lock(tmp_path / "held"), pytest.raises(Stopped), signals.handling_signals(), signals.defer_interrupts():
        launch(["held"])


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


CLAIMS = """
import sys
from fpn_ablate.cli.main import main
from fpn_ablate.sweep import jobs
from fpn_ablate.sweep.checks import as_hydra_error

def claim(count):
    sys.exit("claims")

def job(*arguments):
    try:
        main(["recipe=smoke", "log.wandb=disabled", *arguments])
    except (SystemExit, ImportError) as end:
        print(end, file=sys.stderr)
    print("|", "torch" in sys.modules, file=sys.stderr)

jobs.claim_gpus = claim
job("device=cuda")
job()
sys.modules["torch"] = None  # spares the time that it takes to load
job("device=cpu")
"""


def test_a_job_claims_a_gpu_before_torch_is_loaded(tmp_path):
    """torch would not heed a claim once it has used a GPU. On a processor there is nothing to claim: the job loads torch."""
    done = subprocess.run([sys.executable, "-c", CLAIMS], capture_output=True, text=True, cwd=tmp_path)
    on_cuda, on_auto, on_cpu, _ = re.split(r"^\| ", done.stderr, flags=re.MULTILINE)
    assert "claims" in on_cuda and on_auto.startswith("False") and "claims" in on_auto
    assert on_cpu.startswith("False") and "import of torch halted" in on_cpu and "claims" not in on_cpu


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


ORPHAN = """
import os, pathlib, signal, subprocess, sys, time
from fpn_ablate.utils import signals
if len(sys.argv) > 1:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a worker of joblib that waits for its next job
    signals.end_with_parent()
    with signals.running_job():
        print(os.getpid(), flush=True)
        while not pathlib.Path("saved").exists():
            time.sleep(0.1)
    time.sleep(600)
else:
    subprocess.Popen([sys.executable, __file__, "worker"])
    time.sleep(600)
"""


def test_a_worker_ends_when_its_sweep_is_killed_once_its_job_has(tmp_path):
    script = tmp_path / "orphan.py"
    script.write_text(ORPHAN)
    main = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    status = Path("/proc", main.stdout.readline().strip(), "status")

    def runs():
        return status.exists() and "State:\tZ" not in status.read_text()  # a zombie where nobody reaps it

    assert runs()
    main.kill()
    main.wait()
    time.sleep(1.5)
    assert runs()
    (tmp_path / "saved").touch()
    deadline = time.monotonic() + 20  # less than a job is given
    while runs() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not runs()


@pytest.mark.parametrize(("kind", "code"), [(UserError, 2), (RankFailed, 1)])
def test_a_single_row_ends_with_a_line_in_place_of_a_traceback(kind, code, capsys):
    with pytest.raises(SystemExit) as stop, as_hydra_error(exit_on_error=True):
        raise kind("rank 1: the disk is full")
    assert stop.value.code == code and capsys.readouterr().err == "rank 1: the disk is full\n"

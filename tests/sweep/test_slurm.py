"""Rows as jobs of SLURM, whose commands tests/helpers/fake_slurm.py stands in for; submitit is real."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import fake_slurm
import pytest
from hydra.core.utils import JobReturn, JobStatus

from fpn_ablate.cli import run as cli_run
from fpn_ablate.cli.main import main
from fpn_ablate.sweep import publish, slurm
from fpn_ablate.sweep.jobs import Deferred
from fpn_ablate.utils import signals

ROOT = Path(__file__).parents[2]
ROWS = ["-m", "hydra/launcher=slurm", "recipe=smoke", "log.wandb=disabled"]


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """The folder of the jobs of a fake SLURM. The jobs start in the checkout, from which they import the package."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("FAKE_SLURM", str(tmp_path))
    monkeypatch.setenv("PATH", f"{fake_slurm.install(tmp_path)}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm, "POLL", 0.1)
    monkeypatch.setattr(slurm, "GRACE", 0.5)
    return tmp_path


@pytest.fixture
def command(cluster, monkeypatch, capsys):
    """`command("ablation=c4,fpn")` -> exit code and output of such a sweep."""
    monkeypatch.setattr(sys, "argv", ["fpn-ablate"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(publish, "_publish", lambda *arguments: None)  # which takes seconds

    def call(*arguments):
        try:
            code = main([*ROWS, *arguments, f"out={cluster / 'results'}"])
        except SystemExit as stop:
            code = stop.code
        return code, "".join(capsys.readouterr())

    return call


def queue(cluster):
    """Name -> state of the jobs, without the digests in their names."""
    return {file.read_text()[:-9]: file.with_suffix(".state").read_text() for file in sorted(cluster.glob("*.name"))}


def test_jobs_run_in_fresh_interpreters_and_a_killed_one_costs_its_own_row(cluster, command, monkeypatch):
    """Seed 0 is killed; seed 1 is preempted, saves its checkpoint, is requeued and ends. Both get a signal while they load."""

    class Signal:
        def __reduce__(self):
            return signal.raise_signal, (signal.SIGTERM,)

    early = Signal()

    def run_job(cfg):  # pickled as it is, since no module holds it
        assert early is None
        import os
        import signal
        from pathlib import Path

        from fpn_ablate.utils import signals

        log = Path(os.environ["FAKE_SLURM"], f"seed{cfg.seed}")
        with log.open("a") as file:
            file.write(f"{os.getpid()} {os.environ.get('HOME')} {os.environ['FPN_ABLATE_PAGE']}\n")
        if cfg.seed == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if len(log.read_text().splitlines()) == 1:
            with signals.between_steps():
                os.kill(os.getpid(), signal.SIGTERM)
                log.with_suffix(".checkpoint").touch()

    monkeypatch.setattr(cli_run, "run_job", run_job)
    code, output = command("ablation=c4", "seed=0,1")
    killed, preempted = ((cluster / f"seed{seed}").read_text().splitlines() for seed in (0, 1))
    assert code == 1 and len(killed) == 1 and len(preempted) == 2 and (cluster / "seed1.checkpoint").exists()
    processes = {line.split()[0] for line in (*killed, *preempted)}
    assert len(processes) == 3 and str(os.getpid()) not in processes
    assert {line.partition(" ")[2] for line in (*killed, *preempted)} == {"None off"}  # ours alone, of all variables
    failures = re.findall("^failed: .*", output, re.MULTILINE)
    log = cluster / "results" / "slurm" / "1_0" / "1_0_0_log.out"
    assert len(failures) == 1 and "seed=0" in failures[0] and log.exists()
    assert failures[0].endswith(f"WorkerKilled: SLURM job 1_0 ended without a result: FAILED; its log: {log}")


class Rows:
    """In place of the launcher of hydra-submitit-launcher in a job's process: it gets a signal, or returns a value."""

    def __init__(self, number=0, value=None):
        self.number, self.value = number, value

    def __call__(self):
        with signals.between_steps():
            if self.number:
                signal.raise_signal(self.number)
        return JobReturn(status=JobStatus.COMPLETED, _return_value=self.value)


@pytest.fixture
def requeued(cluster, monkeypatch):
    """This process as job 7: the signals that submitit's handler, which requeues the job, gets."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    calls = []
    signal.signal(signal.SIGUSR2, lambda number, frame: calls.append(number))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(signals, "_state", signals._State())
    (cluster / "7.name").write_text("a row")
    yield calls
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
@pytest.mark.parametrize(("state", "again"), [("RUNNING", True), ("COMPLETING", False), ("CANCELLED", False)])
def test_a_job_that_gets_a_signal_ends_its_step_and_is_requeued_unless_slurm_ends_it(requeued, cluster, number, state, again):
    (cluster / "7.state").write_text(state)
    with pytest.raises(SystemExit) as stop:
        slurm.QueuedJob(Rows(number), {})()
    assert stop.value.code == 128 + number and requeued == [number] * again


def test_a_job_whose_row_is_another_processs_comes_back_later(requeued, cluster):
    (cluster / "7.state").write_text("RUNNING")
    with pytest.raises(SystemExit):
        slurm.QueuedJob(Rows(value=Deferred("lock", "fpn seed 0")), {})()
    assert (cluster / "7.requeue").exists() and not requeued
    assert slurm.QueuedJob(Rows(value=1), {})().return_value == 1


def test_detached_sweeps_return_at_once_and_submit_no_job_twice(cluster, command):
    """What rows share is made by a job of its own, for which theirs wait without a node."""
    (cluster / "hold").touch()
    sent = ["hydra.launcher.detach=true", "task=fast_rcnn", "workers=2", "hydra.launcher.partition=night"]
    code, output = command(*sent, "ablation=c4,fpn")
    names = ["c4-seed0-table2_fast_rcnn", "fpn-seed0-table2_fast_rcnn"]
    assert code == 0 and "python -m fpn_ablate report" in output, output
    assert queue(cluster) == dict.fromkeys(["sources-of-" + names[0], *names], "PENDING")
    first, rows = (script.read_text() for script in sorted(cluster.glob("*.sh")))
    assert "--dependency" not in first and "--dependency=afterany:1\n" in rows
    options = {
        "partition": "night",
        "cpus-per-task": 3,
        "gpus-per-node": 1,
        "time": 1440,
        "signal": "USR2@120",
        "array": "0-1%2",
    }
    assert "#SBATCH --requeue\n" in rows
    assert all(f"#SBATCH --{key}={value}\n" in rows for key, value in options.items())
    code, output = command(*sent, "ablation=c4,fpn,finest")
    assert code == 0 and output.count("of an earlier command") == 3
    assert queue(cluster).keys() == {"sources-of-" + names[0], *names, "finest-seed0-table2_fast_rcnn"}


@pytest.fixture
def while_waiting(monkeypatch):
    """`while_waiting(act)` -> `act()` is called between two looks at the queue."""

    def patch(act):
        monkeypatch.setattr(slurm, "time", SimpleNamespace(sleep=lambda seconds: act(), monotonic=time.monotonic))

    return patch


def test_a_cancelled_job_costs_its_own_row_and_a_sweep_that_is_interrupted_none(cluster, command, while_waiting):
    (cluster / "hold").touch()
    while_waiting(lambda: [(cluster / f"1_{job}.state").write_text("CANCELLED") for job in (0, 1)] and None)
    code, output = command("ablation=c4,fpn")
    assert code == 1 and len(re.findall("^failed: .* ended without a result: CANCELLED", output, re.MULTILINE)) == 2
    while_waiting(lambda: signal.raise_signal(signal.SIGINT))
    code, output = command("ablation=c4,fpn")
    assert code == 130 and "jobs go on: the same command waits for them again; scancel 2_0 2_1 ends them" in output


@pytest.mark.parametrize(
    ("arguments", "device"), [([], "cuda"), (["hydra.launcher.gpus_per_node=null"], "auto"), (["device=cpu"], "cpu")]
)
def test_jobs_that_get_a_gpu_use_it_wherever_the_sweep_is_started(cluster, command, monkeypatch, arguments, device):
    launched = []

    def launch(self, job_overrides, initial_job_idx):
        launched.extend(self.cells.values())
        return [JobReturn(status=JobStatus.COMPLETED) for _ in job_overrides]

    monkeypatch.setattr(slurm.SlurmLauncher, "launch", launch)
    command("ablation=c4", *arguments)
    assert [cfg.device for cfg in launched] == [device]


@pytest.mark.parametrize(
    ("refuse", "arguments", "message"),
    [
        ("sbatch: error: invalid partition specified: nihgt", [], "SLURM takes no job: sbatch: error: invalid partition"),
        ("", ["+hydra.launcher.partion=night"], "partion"),
    ],
)
def test_what_slurm_or_submitit_refuses_is_said_in_a_line(cluster, command, refuse, arguments, message):
    fake_slurm.install(cluster, refuse)
    code, output = command("ablation=c4", *arguments)
    assert code == 2 and message in output and "Traceback" not in output


def test_a_machine_without_slurm_is_told_so(cluster, command, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    code, output = command("ablation=c4")
    assert code == 2 and "hydra/launcher=slurm" in output and "Traceback" not in output


def test_a_launcher_whose_package_is_missing_is_named(command):
    code, output = command("hydra.launcher._target_=hydra_plugins.hydra_moon_launcher.MoonLauncher", "ablation=c4")
    assert code == 2 and output.count("hydra_moon_launcher is not installed") == 1 and "Traceback" not in output


@pytest.mark.slow
def test_jobs_train_what_a_sweep_of_this_machine_trains(cluster, command, monkeypatch):
    """With what two rows of Table 2 share as a job of its own."""
    cells = ["-m", "recipe=smoke", "device=cpu", "threads=1", "log.wandb=disabled", "task=fast_rcnn", "ablation=c4,fpn"]
    assert command(*cells[2:])[0] == 0
    assert main([*cells, "jobs=1", f"out={cluster / 'local'}"]) == 0

    def metrics(out):
        files = (cluster / out).glob("runs/table2_fast_rcnn/*/*/*/record.json")
        return {file.parts[-3]: json.loads(file.read_text())["metrics"] for file in files}

    assert metrics("results") == metrics("local") and metrics("local").keys() == {"c4", "fpn"}
    assert "sources-of-c4-seed0-table2_fast_rcnn" in queue(cluster)

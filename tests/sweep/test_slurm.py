"""Rows as jobs of SLURM, whose commands tests/helpers/fake_slurm.py stands in for; submitit is real."""

import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from threading import Thread

import cloudpickle
import fake_slurm
import pytest
from hydra.core.utils import JobReturn, JobStatus

from fpn_ablate.cli import run as cli_run
from fpn_ablate.cli.main import main
from fpn_ablate.sweep import slurm
from fpn_ablate.utils import signals

ROOT = Path(__file__).parents[2]
ROWS = ["-m", "hydra/launcher=slurm", "recipe=smoke", "device=cpu", "log.wandb=disabled"]


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

    def call(*arguments):
        try:
            code = main([*ROWS, *arguments, f"out={cluster / 'results'}"])
        except SystemExit as stop:
            code = stop.code
        return code, "".join(capsys.readouterr())

    return call


def jobs(cluster):
    return {file.stem: (file.read_text(), file.with_suffix(".state").read_text()) for file in cluster.glob("*.name")}


def test_jobs_run_in_fresh_interpreters_and_a_killed_one_costs_its_own_row(cluster, command, monkeypatch):
    """Seed 0 ends, seed 1 is killed, seed 2 fails, and seed 3 is preempted once and resumed."""

    def run_job(cfg):  # pickled as it is, since no module holds it
        import os
        import signal
        from pathlib import Path

        from fpn_ablate.utils import signals

        mark = Path(os.environ["FAKE_SLURM"], f"seed{cfg.seed}")
        mark.write_text(f"{mark.read_text() if mark.exists() else ''}{os.getpid()} {'HOME' in os.environ}\n")
        if cfg.seed == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if cfg.seed == 2:
            raise ValueError("no such thing")
        if cfg.seed == 3 and len(mark.read_text().splitlines()) == 1:
            with signals.between_steps():
                os.kill(os.getpid(), signal.SIGTERM)
                mark.with_suffix(".checkpoint").touch()

    monkeypatch.setattr(cli_run, "run_job", run_job)
    code, output = command("ablation=c4", "seed=0,1,2,3")
    assert code == 1
    lines = {seed: (cluster / f"seed{seed}").read_text().splitlines() for seed in range(4)}
    assert [len(lines[seed]) for seed in range(4)] == [1, 1, 1, 2]
    assert all("False" in line for seed in lines for line in lines[seed]) and "HOME" in os.environ
    assert str(os.getpid()) not in {line.split()[0] for seed in lines for line in lines[seed]}
    assert (cluster / "seed3.checkpoint").exists()
    assert re.search(r"failed: .*seed=1.*: WorkerKilled: SLURM job 1_1 ended without a result: FAILED; its log: .*1_1_0_log\.out", output)
    assert re.search(r"failed: .*seed=2.*: ValueError: no such thing", output)
    assert "seed=0" not in output.partition("failed: ")[2] and "seed=3" not in output.partition("failed: ")[2]

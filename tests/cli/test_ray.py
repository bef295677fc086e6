"""Sweeps over Ray, for which tests/helpers/stub_ray.py stands in; scripts/drills/ray_cluster.py runs them over Ray itself."""

import json
import os
import signal
import sys
from pathlib import Path

import probe_job
import pytest
from stub_ray import StubRay

from fpn_ablate.cli import run as running
from fpn_ablate.sweep.jobs import WorkerKilled, failed_return

ROOT = Path(__file__).parents[2]
SWEEP = ("-m", "recipe=smoke", "ablation=c4,fpn", "hydra/launcher=ray")


@pytest.fixture
def ray(monkeypatch):
    """Ray's stub; the jobs are `probe_job.run`, which they import by the path that the sweep hands over."""
    stub = StubRay()
    monkeypatch.setitem(sys.modules, "ray", stub)
    monkeypatch.setattr(running, "run_job", probe_job.run)
    monkeypatch.setenv("RAY_task_oom_retries", "")  # restored behind the test
    monkeypatch.delenv("RAY_task_oom_retries")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers")]))
    return stub


def written():
    return {file.stem: json.loads(file.read_text()) for file in Path("results").glob("*.json")}


def test_jobs_have_folder_and_environment_of_the_sweep_and_a_killed_one_costs_its_row_alone(ray, cli, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("SECRET", "of the driver")
    monkeypatch.setenv("WANDB_API_KEY", "which Ray would show to all its users")
    monkeypatch.setenv("FPN_ABLATE_PROBE", "c4:killed")
    handler = signal.getsignal(signal.SIGTERM)
    code, _, err = cli(*SWEEP, "hydra.launcher.ray.init.address=auto", "hydra.launcher.ray.remote.num_cpus=2")
    assert code == 1 and "WorkerKilled: Ray lost its process: The worker died:\n" in err and "Traceback" not in err
    assert set(written()) == {"fpn"}  # below the relative `out`
    job = written()["fpn"]
    assert job["folder"] == os.getcwd()
    assert job["variables"]["OMP_NUM_THREADS"] == "3" and "FPN_ABLATE_STOP" in job["variables"]
    assert not {"SECRET", "WANDB_API_KEY"} & set(job["variables"])
    assert ray.settings["address"] == "auto" and "object_store_memory" not in ray.settings
    assert [(task["num_cpus"], task["max_retries"]) for task in ray.options] == [(2, 1)] * 2
    assert ("RAY_task_oom_retries", "1") in os.environ.items()
    assert signal.getsignal(signal.SIGTERM) == handler


@pytest.mark.slow  # of other launchers: test_run_and_sweep.py, test_jobs.py
def test_with_on_failure_stop_no_row_begins_after_one_that_fails(ray, cli, monkeypatch):
    monkeypatch.setenv("FPN_ABLATE_PROBE", "c4:failed")
    code, _, err = cli(*SWEEP, "on_failure=stop")
    assert code == 1 and "c4 has failed" in err and not written()


@pytest.mark.parametrize(
    ("gpus", "overrides", "expected"),
    [
        (0, [], 0),
        (4, [], 1),
        (4, ["gpus=2", "recipe.accumulate=2"], 2),
        (4, ["device=cpu"], 0),
        (4, ["hydra.launcher.ray.remote.num_gpus=0.5"], 0.5),
    ],
)
def test_a_row_gets_a_gpu_where_there_are_any(ray, cli, monkeypatch, gpus, overrides, expected):
    ray.gpus = gpus
    monkeypatch.setattr(ray, "get", lambda task: failed_return([], WorkerKilled("not run")))
    assert cli(*SWEEP, "ablation=c4", *overrides)[0] == 1
    assert [task["num_gpus"] for task in ray.options] == [expected]
    assert ray.task_settings == {"max_calls": 1}  # a process that is used again keeps its first GPU


def test_a_node_without_the_folder_of_the_sweep_says_so(ray, cli, monkeypatch, tmp_path):
    monkeypatch.setattr(ray, "get", lambda task: task[0](str(tmp_path / "elsewhere"), *task[1][1:]))
    code, _, err = cli(*SWEEP)
    assert code == 1 and f"{tmp_path / 'elsewhere'}: {os.uname().nodename} has no such folder" in err


def test_ctrl_c_cancels_the_tasks_and_waits_for_their_checkpoints(ray, cli, monkeypatch):
    monkeypatch.setattr(ray, "get", lambda task: signal.raise_signal(signal.SIGINT))
    code, _, err = cli(*SWEEP)
    assert code == 130 and "the same command continues" in err
    assert len(ray.cancelled) == 2 and ray.waited == [ray.cancelled, 2]


def test_without_ray_or_a_cluster_the_message_says_what_to_do(ray, cli, monkeypatch):
    def refuse(**settings):
        raise ConnectionError(f"no cluster at {settings['address']}")

    monkeypatch.setattr(ray, "init", refuse)
    code, _, err = cli(*SWEEP, "hydra.launcher.ray.init.address=auto")
    assert code == 2 and "hydra.launcher.ray.init: no cluster at auto" in err and "Traceback" not in err
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1"):
        code, _, err = cli(*SWEEP, f"hydra.launcher.ray.init.address={address}")
        assert code == 2 and f"address={address}: nothing answers there" in err
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = cli(*SWEEP)
    assert code == 2 and 'pip install "fpn-ablate[ray]"' in err

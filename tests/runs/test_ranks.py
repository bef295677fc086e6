"""A row on several processes: the results are those of one to the bit, and what befalls one of them is told in words."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import faulty_neck
import numpy as np
import pytest
import torch
from settings import JOINT, SHORT
from user_folder import write

from fpn_ablate.config.composition import compose
from fpn_ablate.runs import ranks
from fpn_ablate.runs import run as running
from fpn_ablate.utils import signals
from fpn_ablate.utils.errors import RankFailed, UserError

# Parts of two images, so that a batch norm of a map of one cell has two numbers.
SHARED = (*SHORT, "recipe.batch_size=8", "recipe.accumulate=4", "recipe.eval_batch_size=1", "recipe.eval_images=2", "threads=1")
SURE = "task.roi.score_thresh=0.0"  # an untrained network is sure of nothing
CPU = torch.device("cpu")


@pytest.fixture
def cell(tmp_path):
    def make(out, *overrides, config_dir=None):
        return compose((*SHARED, *overrides, f"out={tmp_path / out}"), config_dir)

    return make


def files_of(out):
    """All that the runs below a folder have computed."""
    arrays = {}
    for path in sorted(Path(out).rglob("model.pt")):
        name = str(path.parent.relative_to(out))
        arrays |= {f"{name} {key}": value.numpy() for key, value in torch.load(path, weights_only=True).items()}
        for file in ("detections.npz", "proposals.npz"):
            if path.with_name(file).exists():
                arrays |= {f"{name} {file} {key}": value for key, value in np.load(path.with_name(file)).items()}
        content = json.loads(path.with_name("record.json").read_text())
        assert content["status"] == "finished"
        arrays |= {f"{name} {key}": np.array(value) for key, value in content["metrics"].items() if value is not None}
    return arrays


def assert_equal(a, b):
    a, b = files_of(a.out), files_of(b.out)
    assert a and a.keys() == b.keys()
    for key, value in a.items():
        np.testing.assert_array_equal(b[key], value, err_msg=key)


@pytest.mark.parametrize(
    ("gpus", "task"),
    [
        (2, ("recipe.steps=2", "recipe.short_side=32")),  # batch norms of the backbone are trained
        *(
            pytest.param(gpus, task, marks=pytest.mark.slow)
            for gpus in (2, 4)
            for task in (
                ("task=fast_rcnn", SURE),  # with the RPN that it builds on; its proposals are shared too
                ("neck=bifpn",),
                (*JOINT, SURE),
                ("task=faster_rcnn", "task.training=four_step", SURE),
                ("task=mask_rcnn", SURE),
                ("ablation=retinanet/focal", "task.score_thresh=0.0"),
            )
        ),
        pytest.param(2, ("recipe.group_by_aspect=true", "recipe.flip=true", "workers=1"), marks=pytest.mark.slow),
    ],
)
def test_a_row_on_several_processes_is_that_of_one_to_the_bit(cell, monkeypatch, gpus, task):
    one, several = cell("one", *task), cell("several", *task, f"gpus={gpus}")
    records = [running.run(cfg) for cfg in (one, several)]
    assert records[0]["fingerprint"] == records[1]["fingerprint"]
    assert_equal(one, several)
    monkeypatch.setattr(ranks.RankGroup, "_start", lambda group: pytest.fail("a finished run starts processes"))
    assert running.run(several)["status"] == "finished"


def test_parts_that_cannot_be_shared_and_gpus_that_are_not_there_are_refused(cell, monkeypatch):
    with pytest.raises(UserError, match=r"gpus=3 cannot share the recipe.accumulate=4 parts .* multiple, as 3"):
        cell("out", "gpus=3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="gpus=2: torch sees 1 here"):
        ranks.RankGroup(cell("out", "gpus=2"), torch.device("cuda"))
    ranks.RankGroup(cell("out", "gpus=2"), CPU)
    monkeypatch.setenv("RANK", "of a user's shell")
    ranks.RankGroup(cell("out"), CPU)
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="RANK, MASTER_ADDR, MASTER_PORT is not set"):
        ranks.RankGroup(cell("out"), CPU)
    for name, value in {"RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "tcp"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="MASTER_PORT=tcp: "):
        ranks.RankGroup(cell("out"), CPU)
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(UserError, match="gpus=2, but 4 processes were launched: set gpus=4"):
        ranks.RankGroup(cell("out", "gpus=2"), CPU)


def test_a_process_that_cannot_start_fails_the_run_in_words(cell, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RankFailed, match="the process of rank 1 ended with exit code 1"):
        running.run(cell("out", "gpus=2"))
    (file,) = Path(cell("out").out).rglob("record.json")
    assert json.loads(file.read_text())["status"] == "failed"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        ("SIGKILL", RankFailed, "rank 1 was killed by signal 9, by the system for want of memory"),
        ("memory", UserError, "rank 1: out of memory: set recipe.accumulate above 4, for all rows"),
        ("SIGTERM", signals.Stopped, "15"),
    ],
)
def test_what_befalls_one_rank_ends_all_soon_and_the_run_goes_on_at_another_number(
    cell, tmp_path, monkeypatch, fault, error, words
):
    folder = write(tmp_path / "own", faulty_neck.FILES)
    parts, groups, start = {"config_dir": folder}, [], ranks.RankGroup._start
    monkeypatch.setattr(ranks.RankGroup, "_start", lambda group: groups.append(group) or start(group))
    monkeypatch.setenv("FAULT", fault)
    with pytest.raises(error, match=words) as raised:
        running.run(cell("several", "neck=faulty", "gpus=2", **parts))
    assert [process.poll() is not None for group in groups for process in group.processes] == [True]
    if fault == "SIGTERM":
        assert raised.value.code == 143
    (file,) = (tmp_path / "several").rglob("record.json")
    assert json.loads(file.read_text())["status"] == ("interrupted" if fault == "SIGTERM" else "failed")
    monkeypatch.delenv("FAULT")
    resumed = running.run(cell("several", "neck=faulty", **parts))
    assert resumed["cost"]["resumed_at"] == (1 if fault == "SIGTERM" else 0)
    running.run(one := cell("one", "neck=faulty", **parts))
    assert_equal(one, cell("several", "neck=faulty", **parts))


@pytest.mark.slow
def test_a_rank_with_other_inputs_than_rank_0_is_refused(cell, monkeypatch):
    send = ranks.RankGroup.send
    monkeypatch.setattr(ranks.RankGroup, "send", lambda *rest: send(*rest[:-1], rest[-1] | {"weights": "others"}))
    with pytest.raises(UserError, match=r"^rank 1: .*: weights differ from rank 0's"):
        running.run(cell("out", "gpus=2"))


COMMAND = ("-m", "fpn_ablate", *SHARED, "log.wandb=disabled")


def started(arguments, *words, **variables):
    environment = os.environ | {name: str(value) for name, value in variables.items()}
    return subprocess.Popen([sys.executable, *arguments, *words], env=environment, stdout=subprocess.PIPE, text=True)


def followers_of(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if "fpn_ablate.runs.follow" in Path(f"/proc/{child}/cmdline").read_text()]


def wait_for(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return value


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are listed in /proc")
@pytest.mark.parametrize("of_rank", [0, 1])
def test_sigterm_to_any_process_of_a_command_leaves_a_checkpoint_and_exit_code_143(cell, tmp_path, of_rank):
    steps, out = "recipe.steps=40", f"out={tmp_path / 'several'}"
    process = started(COMMAND, steps, out, "gpus=2")
    wait_for(lambda: any(file.read_text().count("\n") > 1 for file in tmp_path.rglob("metrics.jsonl")))
    (follower,) = followers_of(process.pid)
    os.kill([process.pid, follower][of_rank], signal.SIGTERM)
    process.communicate(timeout=300)
    assert process.returncode == 143
    (file,) = (tmp_path / "several").rglob("checkpoint.pt")
    assert json.loads(file.with_name("record.json").read_text())["status"] == "interrupted"
    running.run(cell("several", steps, "gpus=4"))
    running.run(cell("one", steps))
    assert_equal(cell("one", steps), cell("several", steps))


@pytest.mark.slow
def test_processes_that_torchrun_or_srun_has_started_train_a_row_together(cell, tmp_path):
    out = f"out={tmp_path / 'several'}"
    torchrun = started(("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", *COMMAND), out)
    assert torchrun.wait(500) == 0
    assert torchrun.stdout.read().count(": finished in ") == 1  # rank 0 alone writes
    running.run(cell("one"))
    assert_equal(cell("one"), cell("several"))
    # Finished before: no process waits for another. As with srun, each is told its number.
    address = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500 + os.getpid() % 1000}
    processes = [started(COMMAND, out, RANK=rank, **address) for rank in range(2)]
    assert [process.wait(400) for process in processes] == [0, 0]
    assert "finished before" in processes[0].stdout.read() and not processes[1].stdout.read()
    refused = started((*COMMAND, "-m"), out, RANK=0, **address), started(COMMAND, RANK=1, **address)
    assert [process.wait(400) for process in refused] == [2, 0]


@pytest.mark.slow
def test_rows_that_joblib_runs_at_once_have_their_own_processes(cell, tmp_path):
    out = f"out={tmp_path / 'several'}"
    sweep = started(COMMAND, out, "-m", "ablation=fpn,c4", "gpus=2", "jobs=2")
    assert sweep.wait(500) == 0
    for row in ("fpn", "c4"):
        running.run(cell("one", f"ablation={row}"))
    assert_equal(cell("one"), cell("several"))

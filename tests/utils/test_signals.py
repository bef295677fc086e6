"""SIGTERM and Ctrl-C: a training ends its step with a checkpoint, anything else stops at once."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from settings import SCRATCH

from fpn_ablate.data.shapes import World, load
from fpn_ablate.engine import inputs, pretrain
from fpn_ablate.engine.train import checkpointed_steps, train
from fpn_ablate.model.build import build_detector
from fpn_ablate.model.init import initialise
from fpn_ablate.runs import run as running
from fpn_ablate.store import record
from fpn_ablate.utils import signals
from fpn_ablate.utils.signals import Stopped

CPU = torch.device("cpu")
FIVE = (*SCRATCH, "recipe.steps=5", "recipe.batch_size=2", "rpn.samples=16", "recipe.checkpoint_every=100")


def send(number):
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # Python answers between two instructions


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_outside_of_steps_a_signal_ends_it_at_once(number, code):
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as caught, signals.handling_signals():
        send(number)
        pytest.fail("went on")
    assert caught.value.code == code
    assert signal.getsignal(number) == before and not signals.pending_signal()


def test_a_step_is_ended_before():
    done = []
    with pytest.raises(Stopped), signals.handling_signals(), signals.between_steps():
        for step in range(5):
            if step == 2:
                send(signal.SIGTERM)
                send(signal.SIGTERM)  # to the group, and from the parent
            done.append(step)
            if signals.pending_signal():
                break
    assert done == [0, 1, 2]


def test_what_must_run_to_its_end_within_a_step_leaves_the_signal_to_the_step():
    done = []
    with pytest.raises(Stopped), signals.handling_signals(), signals.between_steps():
        with signals.uninterrupted():
            send(signal.SIGTERM)
            done.append("within")
        done.append("saved")
    assert done == ["within", "saved"]
    with pytest.raises(Stopped), signals.handling_signals():
        with signals.uninterrupted():
            send(signal.SIGTERM)
            done.append("alone")
        pytest.fail("went on")
    assert done[2:] == ["alone"]


def test_a_second_ctrl_c_does_not_wait():
    with pytest.raises(Stopped), signals.handling_signals(), signals.between_steps():
        send(signal.SIGINT)
        send(signal.SIGINT)
        pytest.fail("waited")


@pytest.mark.parametrize(("place", "error"), [(signals.running_job, Stopped), (nullcontext, SystemExit)])
def test_a_worker_without_a_job_ends_without_a_traceback(monkeypatch, place, error):
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: True)
    with pytest.raises(error) as raised, signals.handling_signals(), signals.defer_interrupts(), place():
        send(signal.SIGINT)
        send(signal.SIGINT)
        pytest.fail("went on")
    assert raised.value.code == 128 + signal.SIGINT


def test_whoever_takes_signals_already_keeps_them():
    seen = []
    old = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        with signals.handling_signals():
            send(signal.SIGTERM)
        assert seen == [1] and not signals.pending_signal()
    finally:
        signal.signal(signal.SIGTERM, old)


def _sleep_as(leave, begun):
    if leave:
        signals.outlive_signals()
    begun.set()
    time.sleep(1)


@pytest.mark.parametrize(("leave", "code"), [(False, -signal.SIGTERM), (True, 0)])
def test_a_fork_does_not_take_signals_for_its_parents_and_one_that_loads_images_leaves_them_to_it(leave, code):
    context = multiprocessing.get_context("fork")
    with signals.handling_signals():
        begun = context.Event()
        child = context.Process(target=_sleep_as, args=(leave, begun))
        child.start()
        begun.wait(10)
        child.terminate()
        child.join(10)
    assert child.exitcode == code


@pytest.mark.parametrize("workers", [0, 1])
def test_a_training_that_is_asked_to_stop_keeps_the_step_and_goes_on_to_the_same_weights(config, tmp_path, workers):
    cfg = config(*FIVE, f"workers={workers}")
    pictures = load(World(height=64, width=64, objects=(3, 5), distractors=(0, 2)), 5, 2)[0]

    def trained(path, report=lambda *_: None):
        model = build_detector(cfg, num_classes=1)
        initialise(model, cfg.seed)
        how = {"seed": cfg.seed, "steps": cfg.steps, "workers": workers, "checkpoint": path, "report": report}
        train(model, pictures, cfg.recipe, CPU, **how)
        return model.state_dict()

    def stop(done, values):
        if done == 3:
            for child in multiprocessing.active_children():  # SLURM tells every process of a job
                child.terminate()
            send(signal.SIGTERM)

    with pytest.raises(Stopped), signals.handling_signals():
        trained(tmp_path / "checkpoint.pt", stop)
    assert checkpointed_steps(tmp_path / "checkpoint.pt") == 4  # asked for in step 3, after it had looked
    whole, again = trained(tmp_path / "whole.pt"), trained(tmp_path / "checkpoint.pt")
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    assert checkpointed_steps(tmp_path / "whole.pt") == 5  # what is killed while it is evaluated is not trained again


def pre_trained(cfg, folder):
    pictures = inputs.world(cfg.data, cfg.recipe.short_side)
    return pretrain.load_or_pretrain(cfg.backbone, cfg.recipe.pretrain, pictures, folder, CPU).path


def test_a_pre_training_goes_on_to_the_same_weights_with_the_threads_of_its_start(config, tmp_path, monkeypatch):
    cfg = config("recipe.pretrain.steps=5", "recipe.pretrain.batch_size=4", "recipe.pretrain.side=32")
    monkeypatch.setattr(pretrain, "HELD_OUT", 4)
    steps, threads = [], []
    entropy = pretrain.F.cross_entropy

    def stop_in_the_third(*arguments):
        steps.append(1)
        if len(steps) == 3:
            send(signal.SIGTERM)
        return entropy(*arguments)

    def unchanged(count):  # several threads would be slow beside other tests
        threads.append(count)
        return nullcontext()

    monkeypatch.setattr(pretrain, "num_threads", unchanged)
    with monkeypatch.context() as patch, pytest.raises(Stopped), signals.handling_signals():
        patch.setattr(pretrain.F, "cross_entropy", stop_in_the_third)
        patch.setattr(torch, "get_num_threads", lambda: 4)
        pre_trained(cfg, tmp_path / "cut")
    (kept,) = (tmp_path / "cut").glob("*-checkpoint.pt")
    assert checkpointed_steps(kept) == 3 and len(steps) == 3
    whole, again = (pre_trained(cfg, tmp_path / name) for name in ("whole", "cut"))
    assert threads == [3, 1, 3]
    assert [json.loads(path.with_suffix(".json").read_text())["threads"] for path in (whole, again)] == [1, 3]
    a, b = (torch.load(path, weights_only=True) for path in (whole, again))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not kept.exists()


def test_a_process_that_loads_images_ends_with_its_parent_even_if_it_hangs():
    """Somebody holds the batches until the end: a traceback, say."""
    program = """
import time, torch
from torch.utils.data import DataLoader
from fpn_ablate.utils import signals
signals.LOADER_GRACE = 1
class Hanging(torch.utils.data.Dataset):
    def __len__(self): return 4
    def __getitem__(self, index): time.sleep(25)
batches = iter(DataLoader(Hanging(), num_workers=1, worker_init_fn=signals.outlive_signals))
held = [batches]
held.append(held)
time.sleep(0.3)
print("end", flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "end\n"
    assert process.wait(15) == 0  # sooner than its batch is there


@pytest.mark.parametrize(("error", "status"), [(None, "finished"), (ValueError("no"), "failed")])
def test_a_signal_while_the_record_is_written_does_not_leave_it_as_running(config, tmp_path, monkeypatch, error, status):
    row = SimpleNamespace(
        cfg=config(), folder=tmp_path, title="fpn seed 0", describe=dict, loggers=[], write_config=lambda: None
    )

    def carry_out(run):
        if error:
            raise error
        return {}

    def interrupted(folder, outcome):
        if outcome["status"] != "running":
            send(signal.SIGTERM)
        write(folder, outcome)

    write = record.write
    monkeypatch.setattr(record, "write", interrupted)
    monkeypatch.setattr(running, "_train_and_evaluate", carry_out)
    with pytest.raises(Stopped), signals.handling_signals(), signals.reraise_as_stopped():
        running._run_and_record(row)
    assert record.read(tmp_path)["status"] == status


@pytest.mark.parametrize(
    ("swept", "findings"),
    [
        ("trap '' TERM; echo; sleep 1", ["signal 1, before the first run: exit code 0 after"]),  # it is swallowed
        ("trap 'wait; exit 143' TERM; sleep 30 & echo; wait", []),  # the leader waits for the group
    ],
)
def test_a_drill_signals_a_whole_sweep_and_sees_one_that_goes_on(script, tmp_path, monkeypatch, swept, findings):
    drills = script("drills/kills")
    monkeypatch.setattr(drills, "GRACE", 0.5)
    process = subprocess.Popen(["bash", "-c", swept], stdout=subprocess.PIPE, start_new_session=True)
    process.stdout.readline()
    drills._send_signal(process, tmp_path, signal.SIGTERM, tally := drills.Tally())
    assert [found.rpartition(" after")[0] + " after" for found in tally.findings] == findings


@pytest.mark.parametrize("error", [ImportError, SystemExit])
def test_an_error_that_comes_of_a_signal_is_none(error):
    with pytest.raises(Stopped), signals.handling_signals(), signals.reraise_as_stopped(), signals.between_steps():
        send(signal.SIGTERM)
        raise error("numpy failed to import")
    with pytest.raises(error), signals.handling_signals(), signals.reraise_as_stopped():
        raise error("of its own")

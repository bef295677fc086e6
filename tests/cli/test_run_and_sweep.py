"""One row and sweeps, as the command line runs them: refusals, tables, failures, interruptions."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from settings import TINY

from fpn_ablate.engine import inputs, procedures
from fpn_ablate.engine.train import checkpointed_steps
from fpn_ablate.runs import run as running
from fpn_ablate.runs.state import Run
from fpn_ablate.store import plan
from fpn_ablate.store.layout import run_lock
from fpn_ablate.sweep import jobs, publish
from fpn_ablate.sweep.announce import announce_run, announce_sweep
from fpn_ablate.sweep.checks import reject_duplicate_rows, reject_unfair_rows, reject_unread_keys
from fpn_ablate.utils.errors import Diverged, UserError
from fpn_ablate.utils.locks import lock
from fpn_ablate.weights.shipped import SHIPPED


def records(folder="results/runs"):
    return {f"{r['row']}/{r['seed']}": r for r in (json.loads(p.read_text()) for p in Path(folder).rglob("record.json"))}


@pytest.mark.parametrize("sweep", [[], ["-m"]], ids=["one", "sweep"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["neck.topdown=true"], r"neck.topdown with neck=fpn: .*Did you mean neck.top_down\? Allowed in neck: channels"),
        (["+neck.topdown=true"], r"Did you mean neck.top_down\?"),
        (["ablation=retinanet/focal", "rpn.samples=8"], "rpn.samples=8: nothing reads it, as task=retinanet has no RPN"),
        (["+row=mine"], r"row: there is no such key"),
        (
            ["ablation=fpm"],
            r"^ablation=fpm: there is no such file\. Did you mean ablation=fpn\? Else a file of your own: ",
        ),
        (["neck.upsample=cubic"], r"neck.upsample='cubic': give 'nearest', 'bilinear', 'deconv' or 'carafe'"),
        (["experiments=table99"], r"^experiments=table99: there is no such file\. .*table1,"),
        (["recipe.short_side=${nope}"], r"recipe.short_side: Interpolation key 'nope' not found"),
        (["++recipe.name=null"], r"recipe.name=None: give a text"),
        (["~task"], r"task: missing; set task=..."),
        (["data=coco", "data.root=nowhere"], r"data.root=nowhere is not a folder"),
        (["data=coco"], r"data.root: missing: give data.root=FOLDER"),
        (["backbone.weights=none.pth"], r"backbone.weights=none.pth: no such file; give a file of weights"),
        (["task=faster_rcnn", "mode=evaluate", "weights=none.pth"], r"none.pth: no such file"),
        (
            ["backbone=resnet18", f"backbone.weights={SHIPPED / 'small.safetensors'}"],
            "does not fit .*; give a file of this backbone, or the backbone",
        ),
    ],
)
def test_bad_input_stops_at_once_with_a_message_and_no_traceback(cli, sweep, arguments, message):
    code, out, err = cli(*sweep, "recipe=smoke", *arguments)
    assert code not in (0, None)
    assert re.search(message, out + err)
    assert "Traceback" not in out + err
    assert not records()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("neck.channels=8,9,10,11,12,0", "neck.channels=0"),
        ("neck.upsample=nearest,bilinear,cubic", "neck.upsample='cubic'"),
        ("ablation=c4,c5,fpm", "fpm"),
    ],
)
def test_a_bad_value_in_a_late_job_stops_before_the_first_trains(cli, monkeypatch, bad, message):
    monkeypatch.setattr(procedures, "train", lambda *_, **__: pytest.fail("something was trained"))
    code, out, err = cli("-m", *TINY, bad)
    assert code not in (0, None)
    assert message in out + err
    assert "Traceback" not in out + err
    assert not Path("results").exists() or not records()


def test_a_wrong_definition_of_the_users_stops_before_the_first_job_trains(cli, mine, monkeypatch):
    monkeypatch.setattr(running, "run", lambda *_: pytest.fail("trained"))
    (mine / "experiments").mkdir()
    (mine / "experiments" / "own.yaml").write_text("# @package _global_\ntable: own\nreport: {title: own, columns: table1}\n")
    code, _, err = cli("--config-dir", mine, "-m", "+experiments=own", "recipe=smoke", "ablation=fpn,c4")
    assert code == 2 and "own.yaml: report.columns='table1': there is no " in err


def test_weights_that_cannot_be_downloaded_stop_a_sweep_before_its_first_row(cli, monkeypatch, tmp_path):
    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    code, _, err = cli("-m", *TINY, "backbone=resnet18", "backbone.weights=imagenet", "ablation=fpn,c4")
    assert code == 2 and err.count("cannot be downloaded (no network)") == 1
    assert not records()


def test_two_rows_that_are_one_configuration_are_refused(cli):
    code, out, err = cli("-m", *TINY, "ablation=fpn,finest", "neck.output=p2")
    assert code not in (0, None)
    assert "are the same configuration: take one of them out" in out + err
    assert not records()


def test_keys_of_the_rpn_are_for_the_rows_of_a_sweep_that_have_one(config):
    cells = [config("ablation=retinanet/focal"), config("task=segment_proposals"), config("ablation=retinanet/two_stage")]
    reject_unread_keys(cells, ["seed=0", "++rpn.samples=8"])
    with pytest.raises(UserError, match="as task=retinanet and task=segment_proposals has no RPN"):
        reject_unread_keys(cells[:2], ["seed=0", "++rpn.samples=8"])
    with pytest.raises(UserError, match=r"rpn\.nms_thresh=0\.5: nothing reads it"):  # they are in the file
        reject_unread_keys([config("task=fast_rcnn", "task.proposals.file=a.npz")], ["rpn.nms_thresh=0.5"])


@pytest.mark.parametrize(
    ("key", "fixed"),
    [
        ("weights", ("mode=evaluate", "task=faster_rcnn")),
        ("backbone.weights", ()),
        ("data.root", ("data=coco",)),
        ("task.proposals.file", ("task=fast_rcnn",)),
    ],
)
def test_files_that_would_be_one_row_are_refused(config, key, fixed):
    cells = [config(*fixed, f"{key}=/{folder}/same.pth") for folder in "ab"]
    with pytest.raises(UserError, match=rf"{key}=/a/same.pth and /b/same.pth are both the row fpn.*: give one"):
        reject_duplicate_rows(cells)
    reject_duplicate_rows([cells[0], config(*fixed, f"{key}=/b/other.pth")])


def test_rows_that_their_table_would_refuse_are_refused_before_the_first_trains(cli, config):
    code, out, err = cli("-m", *TINY, "ablation=fpn,walkthrough")
    assert (code, out) == (2, "") and not records()
    assert "the rows of this sweep differ in more than image_pyramid, neck, so they cannot be compared" in err
    assert "backbone.name walkthrough against small" in err and "(rows fpn | walkthrough)" in err
    same = ("backbone=walkthrough", "factors=[neck,rpn]")
    reject_unfair_rows(
        [config("ablation=walkthrough", *same), config("ablation=fpn", *same), config("ablation=c4", "data.seed=1")]
    )


def test_a_sweep_trains_prints_and_writes_its_table_and_is_skipped_the_second_time(cli, monkeypatch, plotted):
    code, out, _ = cli("-m", *TINY, "ablation=c4,fpn", "seed=0,1")
    assert code == 0
    found = records()
    assert set(found) == {"c4/0", "c4/1", "fpn/0", "fpn/1"}
    assert {r["status"] for r in found.values()} == {"finished"}
    assert len({r["setting"] for r in found.values()}) == 1
    for text in ("47k", "200k", "48.3", "56.3", "GENERATED DATA"):
        assert text in out
    assert {p.suffix for p in Path("results/tables").iterdir()} == {".md", ".csv", ".tex"}
    assert {p.suffix for p in Path("results/plots").iterdir()} == {".png", ".svg"}
    assert Path("results/ledger.csv").exists()

    monkeypatch.setattr(procedures, "train", lambda *_, **__: pytest.fail("something was trained"))
    code, again, _ = cli("-m", *TINY, "ablation=c4,fpn", "seed=0,1")
    assert code == 0
    assert again.count("finished before") == 4
    assert "200k" in again


def test_a_row_that_diverges_is_shown_as_such_and_the_others_go_on(cli, monkeypatch):
    train = procedures.train

    def diverge_on_c4(model, *rest, **named):
        if len(model.neck.levels) == 1:
            raise Diverged("diverged at step 1: rpn_box is nan")
        return train(model, *rest, **named)

    monkeypatch.setattr(procedures, "train", diverge_on_c4)
    code, out, err = cli("-m", *TINY, "ablation=c4,fpn")
    assert code not in (0, None)
    assert "diverged at step 1: rpn_box is nan" in out + err
    assert {row: r["status"] for row, r in records().items()} == {"c4/0": "diverged", "fpn/0": "finished"}
    assert "diverged" in out
    assert "200k" in out


def test_with_on_failure_stop_no_other_row_begins(cli, monkeypatch):
    def fail(*_, **__):
        raise ValueError("no")

    monkeypatch.setattr(procedures, "train", fail)
    monkeypatch.setattr(publish, "_publish", lambda *_: None)
    code, out, err = cli("-m", *TINY, "ablation=c4,fpn", "on_failure=stop")
    assert code not in (0, None) and "ValueError: no" in out + err
    assert {row: r["status"] for row, r in records().items()} == {"c4/0": "failed"}
    assert not list(Path("results/runs/.plans").glob("*.stop"))


def test_a_signal_leaves_a_checkpoint_and_what_is_left_is_not_begun(cli, config, monkeypatch, capsys):
    log = running.Run.log

    def strike(self, step, values):
        log(self, step, values)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(running.Run, "log", strike)
        got, _, err = cli("-m", *TINY, "recipe.steps=9", "log.every=4", "ablation=c4,fpn")
    assert got == 143 and "the same command continues" in err and "Traceback" not in err
    assert "SIGTERM: finishing step 5, then saving; Ctrl-C stops now" in err
    assert "not finished: 2 of 2 runs (c4, fpn)\n" in err
    assert {row: r["status"] for row, r in records().items()} == {"c4/0": "interrupted"}
    assert not Path("results/tables").exists()  # there is no time for that
    assert plan.has_leftover_plan(Path("results/runs"))  # for the process that writes the last page
    (checkpoint,) = Path("results").rglob("checkpoint.pt")
    assert checkpointed_steps(checkpoint) in (4, 5)
    begun, other, longer = (
        config(*TINY, "recipe.steps=9", "log.every=4", *more)
        for more in (["ablation=c4"], [], ["ablation=c4", "recipe.steps=10"])
    )
    announce_run(begun)
    announce_sweep([begun, other], [begun, other], 1)
    announce_run(longer)
    told = capsys.readouterr().out
    assert "seed 0: continues, about 4 of 9 steps done, about" in told and "2 runs, 1 begun before, about" in told
    assert "seed 0: 10 steps, about" in told


def test_a_row_that_another_process_works_on_goes_to_the_end_of_the_sweep(cli, config, monkeypatch):
    cfg = config(*TINY, "ablation=c4")
    held = lock(run_lock("results", Run(cfg, inputs.prepare(cfg), 0).fingerprint))
    monkeypatch.setattr(jobs.time, "sleep", lambda _: held.release())
    Path(held.lock_file).parent.mkdir(parents=True)
    held.acquire()
    code, out, err = cli("-m", *TINY, "ablation=c4,fpn")
    assert code == 0 and err.count("c4 seed 0: another row or process is working on it; waiting") == 1
    told = out + err
    assert told.index("fpn seed 0: finished in ") < told.index("; waiting")  # which is no reason to do nothing
    assert {row: r["status"] for row, r in records().items()} == {"c4/0": "finished", "fpn/0": "finished"}


@pytest.mark.parametrize("start", [["data=coco", "data.root=nowhere"], ["backbone.weights=nowhere"]], ids=["data", "weights"])
@pytest.mark.parametrize("sweep", [[], ["-m", "ablation=c4,fpn"]], ids=["one", "sweep"])
def test_what_cannot_begin_is_refused_once_and_has_no_tables(cli, sweep, start):
    code, out, err = cli(*sweep, *start, "recipe=smoke", "device=cpu")
    assert (code, out) == (2, "") and "nowhere" in err.splitlines()[0] and (out + err).count("nowhere") == 1
    assert not [*Path("results").rglob("*.html"), *Path("results").rglob("ledger.csv")]


def test_a_run_that_is_refused_ends_with_the_reason(cli, put, runs, monkeypatch):
    """It has no record, so that the table of the other rows is as it was."""

    def refuse(*_):
        raise UserError("device=cuda: torch sees no GPU")

    put("c4", recipe="smoke")
    monkeypatch.setattr(running, "run", refuse)
    code, out, err = cli("recipe=smoke", f"out={runs.parent}")
    assert (code, err) == (2, "device=cuda: torch sees no GPU\n") and "written" not in out


def test_a_launcher_without_a_sweep_is_refused(cli):
    for option in ("hydra/launcher=joblib", "hydra/sweeper=basic"):
        code, _, err = cli("recipe=smoke", option)
        assert code == 2 and f"{option} is for sweeps: add -m, or leave it out" in err


def test_an_interval_without_a_search_is_refused(cli):
    code, _, err = cli("-m", "recipe=smoke", "recipe.optimizer.lr=interval(1e-4,1e-1)")
    assert code == 2 and "recipe.optimizer.lr=interval(1e-4,1e-1): hydra/sweeper=optuna searches intervals" in err

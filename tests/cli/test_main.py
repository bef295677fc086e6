"""The command line, in this process: refusals, sweeps, tables."""

import contextlib
import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from fpn_ablate.config.overrides import normalise

from fpn_ablate.cli.run import main
from fpn_ablate.engine import procedures
from fpn_ablate.engine.train import checkpointed_steps
from fpn_ablate.runs import run as running
from fpn_ablate.sweep.publish import publish
from fpn_ablate.tracking import loggers
from fpn_ablate.utils import hashing
from fpn_ablate.utils.errors import Diverged, UserError

TINY = [
    "recipe=smoke",
    "backbone.weights=none",
    "backbone.freeze_at=0",
    "backbone.frozen_bn=false",
    "recipe.steps=2",
    "recipe.batch_size=2",
    "recipe.eval_images=2",
    "data.train_images=2",
    "device=cpu",
]


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """`cli("ablation=c4")` -> (exit code, standard output, standard error), in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fpn-ablate"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv(loggers.CELLS, "1")
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments):
        capsys.readouterr()
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


def records(folder="results/runs"):
    return {f"{r['row']}/{r['seed']}": r for r in (json.loads(p.read_text()) for p in Path(folder).rglob("record.json"))}


@pytest.mark.parametrize("sweep", [[], ["-m"]], ids=["one", "sweep"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["neck.topdown=true"], r"neck.topdown: there is no such key. Did you mean neck.top_down\? Allowed in neck: channels"),
        (["+neck.topdown=true"], r"Did you mean neck.top_down\?"),
        (["++neck.topdown=true"], r"Did you mean neck.top_down\?"),
        (["+row=mine"], r"row: there is no such key"),
        (["ablation=fpm"], r"ablation/fpm[\s\S]*bottom_up[\s\S]*c4[\s\S]*c5[\s\S]*finest[\s\S]*fpn[\s\S]*no_lateral"),
        (["neck=fpm"], r"neck/fpm[\s\S]*fpn[\s\S]*single_level"),
        (["recipe=none"], r"recipe/none[\s\S]*quick[\s\S]*smoke"),
        (["neck.upsample=cubic"], r"neck.upsample='cubic': input should be 'nearest', 'bilinear' or 'deconv'"),
        (["neck.top_down=false", "neck.lateral=false"], r"connects P2..P4 to nothing"),
        (["ablation=bottom_up", "neck.lateral=false"], r"connects P2..P4 to nothing"),
        (["ablation=c4", "+neck.channels=8"], r"neck.channels with neck=single_level: .*Allowed in neck: level, name"),
        (["recipe.steps=0"], r"recipe.steps=0: input should be greater than 0"),
        (["factors=[nek]"], r"factors: nek: there is no such key. Did you mean neck\?"),
        (["factors=[seed]"], r"factors: seed cannot be one. Allowed: backbone, neck, head, task"),
        (["seed=x"], r"seed='x': input should be a valid integer"),
        (["experiments=table99"], r"experiments/table99[\s\S]*table1_rpn"),
        (["recipe.short_side=${nope}"], r"recipe.short_side: Interpolation key 'nope' not found"),
        (["++recipe.name=null"], r"recipe.name=None: must be a text"),
        (["~task"], r"task: missing; give task=..."),
        (["neck=[1]"], r"neck=\[1\]: give the name of a file in conf/neck"),
        (["neck=null"], r"neck=null: give the name of a file in conf/neck, as neck=fpn"),
        (["task={}"], r"task=\{\}: give the name of a file in conf/task"),
        (["data=coco", "data.root=nowhere"], r"data.root=nowhere is not a folder"),
        (["rpn.anchor_sizes=[32,64]"], r"rpn.anchor_sizes has 2 sizes for the 5 levels p2, p3, p4, p5, p6"),
    ],
)
def test_bad_input_stops_at_once_with_a_message_and_no_traceback(cli, sweep, arguments, message):
    code, out, err = cli(*publish, "recipe=smoke", *arguments) if arguments != ["recipe=none"] else cli(*publish, *arguments)
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
    monkeypatch.setattr(procedures, "train", lambda *a: pytest.fail("something was trained"))
    code, out, err = cli("-m", *TINY, bad)
    assert code not in (0, None)
    assert message in out + err
    assert "Traceback" not in out + err
    assert not Path("results").exists() or not records()


def test_two_rows_that_are_one_configuration_are_refused(cli):
    code, out, err = cli("-m", *TINY, "ablation=fpn,finest", "neck.output=p2")
    assert code not in (0, None)
    assert "are the same configuration: take one of them out" in out + err
    assert not records()


def test_a_sweep_trains_prints_and_writes_its_table_and_is_skipped_the_second_time(cli, monkeypatch):
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

    monkeypatch.setattr(procedures, "train", lambda *a: pytest.fail("something was trained"))
    code, again, _ = cli("-m", *TINY, "ablation=c4,fpn", "seed=0,1")
    assert code == 0
    assert again.count("finished before") == 4
    assert "200k" in again


def test_a_row_that_diverges_is_shown_as_such_and_the_others_go_on(cli, monkeypatch):
    train = procedures.train

    def diverge_on_c4(model, dataset, cfg, *rest):
        if cfg.row == "c4":
            raise Diverged("diverged at step 1: rpn_box is nan")
        return train(model, dataset, cfg, *rest)

    monkeypatch.setattr(procedures, "train", diverge_on_c4)
    code, out, err = cli("-m", *TINY, "ablation=c4,fpn")
    assert code not in (0, None)
    assert "diverged at step 1: rpn_box is nan" in out + err
    assert {row: r["status"] for row, r in records().items()} == {"c4/0": "diverged", "fpn/0": "finished"}
    assert "diverged" in out
    assert "200k" in out


def test_a_loss_that_blows_up_by_itself_is_a_divergence(cli):
    code, out, err = cli(
        *TINY, "recipe.steps=8", "recipe.clip_norm=null", "recipe.optimizer.name=sgd", "recipe.optimizer.lr=1.0e+20"
    )
    assert code not in (0, None)
    assert re.search(r"diverged at step \d: rpn_\w+ is (nan|inf)", out + err)
    (left,) = records().values()
    assert left["status"] == "diverged"


def test_switches_on_the_command_line_name_the_row_and_other_changes_the_recipe(cli):
    code, out, _ = cli(*TINY, "neck.upsample=bilinear", "rpn.samples=8")
    assert code == 0
    (found,) = records().values()
    assert found["row"] == "fpn+upsample=bilinear"
    assert found["recipe"].startswith("smoke+")
    assert "rpn.samples=8" in found["recipe"]
    assert "steps=2" in found["recipe"]
    assert not any(word in found["recipe"] for word in ("device", "seed", "upsample"))
    assert "fpn+upsample=bilinear" in out


def test_the_verifier_prints_every_row_before_training(cli):
    code, out, _ = cli("verify", "recipe=smoke")
    assert code == 0
    lines = {line.split("│")[1].strip(): line for line in out.splitlines() if line.count("│") > 5}
    expected = {"c4": "47,250", "c5": "12,000", "finest": "750,000"} | dict.fromkeys(
        ("fpn", "bottom_up", "no_lateral"), "199,974"
    )
    assert set(expected) <= set(lines)
    for row, anchors in expected.items():
        assert anchors in lines[row]
    assert "c2 c3 c4 c5" in lines["fpn"]
    assert not records()
    assert cli("verify", "neck.topdown=true")[0] == 2
    assert cli("verify", "ablation=fpm")[0] == 2


@pytest.mark.parametrize("arguments", [["-m", "--cfg", "job"], ["--cfg=job", "seed=1,2", "--multirun"], ["-m", "-c", "job"]])
def test_what_hydra_does_one_at_a_time_is_asked_for_one_at_a_time(arguments):
    with pytest.raises(UserError, match=r"^--cfg and --multirun: give one of them"):
        normalise(arguments)
    assert normalise(["-m", "--multirun"]) == ["-m", "--multirun"]


def test_an_experiment_is_known_by_the_beginning_of_its_name():
    assert normalise(["+experiments=table1"]) == ["+experiments=table1_rpn"]
    assert normalise(["experiments=table1_rpn"]) == ["+experiments=table1_rpn"]
    assert normalise(["recipe=smoke", "-m", "seed=1,2"]) == ["-m", "recipe=smoke", "seed=1,2"]
    assert normalise(["recipe=smoke", "--multirun", "seed=1,2"]) == ["--multirun", "recipe=smoke", "seed=1,2"]
    assert normalise(["+experiments=table5"]) == ["+experiments=table5_sharing"]
    with pytest.raises(UserError, match="which of table1_rpn, table2_fast_rcnn, table3_faster_rcnn, table5_sharing"):
        normalise(["+experiments=table"])
    with pytest.raises(UserError, match=r"nek.top_down: there is no such key. Did you mean neck\?"):
        normalise(["-m", "nek.top_down=false"])
    with pytest.raises(UserError, match=r"task\.training goes with task=faster_rcnn, not with task=rpn"):
        normalise(["task.training=joint"])
    with pytest.raises(UserError, match=r"task\.roi\.samples goes with task=fast_rcnn or task=faster_rcnn, not with task=rpn"):
        normalise(["-m", "task.roi.samples=3", "task=rpn"])
    with pytest.raises(UserError, match=r"task\.trainin: .*Did you mean task\.training"):
        normalise(["task.trainin=joint"])
    for elsewhere in ("+experiments=table2", "--config-dir=mine"):
        normalise([elsewhere, "task.roi.samples=3"])
    for mode in (["-m"], ["--cfg", "job"]):
        plain = [*mode, "hydra.verbose=true", "hydra/launcher=joblib", "ablation=fpn", "~neck.p6"]
        assert normalise(plain) == plain


def test_with_on_failure_stop_no_other_row_begins(cli, monkeypatch):
    def fail(*_):
        raise ValueError("no")

    monkeypatch.setattr(procedures, "train", fail)
    monkeypatch.setattr(publish, "_publish", lambda *_: None)
    code, out, err = cli("-m", *TINY, "ablation=c4,fpn", "on_failure=stop")
    assert code not in (0, None) and "ValueError: no" in out + err
    assert {row: r["status"] for row, r in records().items()} == {"c4/0": "failed"}
    assert not list(Path("results/runs/.plans").glob("*.jobs"))


def test_a_signal_leaves_a_checkpoint_and_what_is_left_is_not_begun(cli, monkeypatch):
    log = running.Run.log

    def strike(self, step, values):
        log(self, step, values)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(running.Run, "log", strike)
        got, _, err = cli("-m", *TINY, "recipe.steps=9", "log.every=4", "ablation=c4,fpn")
    assert got == 143 and "the same command goes on" in err and "Traceback" not in err
    assert {row: r["status"] for row, r in records().items()} == {"c4/0": "interrupted"}
    assert not Path("results/tables").exists()  # there is no time for that
    (checkpoint,) = Path("results").rglob("checkpoint.pt")
    assert checkpointed_steps(checkpoint) in (4, 5)


def test_a_cell_whose_process_was_killed_for_good_says_so(cli, config, monkeypatch):
    """Of this code alone, and not while another process is at it."""
    cfg, known = config(), {"fingerprint": "0123456789abcdef", "code": hashing.code_version()}
    file = running.cell_folder(cfg, known["fingerprint"]) / "record.json"
    Path("results/runs/.locks").mkdir(parents=True)
    file.parent.mkdir(parents=True)
    lock = FileLock(f"results/runs/.locks/{known['fingerprint']}")
    for status, code, held, left in (
        ("finished", known["code"], False, "finished"),
        ("running", "another", False, "running"),
        ("running", known["code"], True, "running"),
        ("running", known["code"], False, "failed"),
    ):
        file.write_text(json.dumps(known | {"status": status, "code": code}))
        with lock if held else contextlib.nullcontext():
            publish.mark_killed(cfg, "WorkerKilled: twice")
        assert json.loads(file.read_text())["status"] == left
    assert json.loads(file.read_text())["error"] == "WorkerKilled: twice"

    @contextlib.contextmanager
    def ends_just_before(*arguments, **options):
        file.write_text(json.dumps(known | {"status": "finished"}))
        yield

    monkeypatch.setattr(publish, "lock", ends_just_before)
    file.write_text(json.dumps(known | {"status": "running"}))
    publish.mark_killed(cfg, "WorkerKilled: twice")
    assert json.loads(file.read_text())["status"] == "finished"

"""A finished cell is told at once from what is on disk, and in any doubt everything is read again."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fpn_ablate.cli.run import main
from fpn_ablate.cli.shapes import main as export_shapes
from fpn_ablate.engine import inputs
from fpn_ablate.model.build import build_backbone
from fpn_ablate.model.init import initialise
from fpn_ablate.runs import run as running
from fpn_ablate.runs import skip
from fpn_ablate.store import record
from fpn_ablate.utils import stamps

TINY = (
    *("recipe=smoke", "recipe.steps=2", "recipe.batch_size=2", "recipe.eval_images=2", "rpn.samples=16", "device=cpu"),
    "recipe.pretrain.steps=2",
)
LATER = 10.0  # seconds from now: all files that a test has just made are old by then


@pytest.fixture(scope="module")
def cell(config, tmp_path_factory):
    """A finished cell on a COCO-format set, from a file of weights: its configuration, its inputs, its record, its folder."""
    place = tmp_path_factory.mktemp("finished")
    export_shapes(["--export", str(place / "set"), "--train", "3", "--val", "2", "--size", "64"])
    backbone = build_backbone(config().backbone)
    initialise(backbone, 0)
    torch.save(backbone.state_dict(), place / "weights.pth")
    own = ("data=coco", f"data.root={place / 'set'}", f"backbone.weights={place / 'weights.pth'}")
    cfg = config(*TINY, *own).model_copy(update={"out": str(place / "results")})
    outcome = running.run(cfg)
    return cfg, inputs.prepare(cfg), outcome, running.run_folder(cfg, outcome["fingerprint"])


@pytest.fixture
def told(cell):
    """The same, told to be finished, with all files as they are now."""
    cfg, given, outcome, folder = cell
    skip.write_skip_entry(cfg, given, outcome["fingerprint"], time.time() + LATER)
    assert skip.finished_record(cfg) == record.read(folder)
    return cfg, folder


def known(cfg):
    stamps._stamp.cache_clear()  # as in another process
    return skip.finished_record(cfg)


def rewritten(file: Path) -> None:
    """Another file of equal size, and of the same time as far as its writer can choose it."""
    before, content = file.stat(), file.read_bytes()
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("pattern", ["set/**/instances_train.json", "set/**/instances_val.json", "set/**/*.png", "weights.pth"])
def test_a_file_that_was_written_again_is_a_doubt(told, pattern):
    cfg, _ = told
    rewritten(next(Path(cfg.data.root).parent.glob(pattern)))
    assert known(cfg) is None


def test_a_picture_more_or_less_is_a_doubt(told, cell):
    cfg, _ = told
    picture = next(Path(cfg.data.root).rglob("*.png"))
    aside = picture.rename(Path(cfg.data.root, "aside.png"))
    assert known(cfg) is None
    aside.rename(picture)
    skip.write_skip_entry(cfg, cell[1], cell[2]["fingerprint"], time.time() + LATER)
    assert known(cfg)
    (picture.parent / "another.png").write_bytes(b"")
    assert known(cfg) is None
    (picture.parent / "another.png").unlink()


@pytest.mark.parametrize("name", ["annotations/instances_train.json", "../weights.pth"])
def test_a_file_that_is_gone_is_a_doubt(told, name):
    cfg, _ = told
    file = Path(cfg.data.root, name)
    aside = file.rename(file.with_name("aside"))
    assert known(cfg) is None
    aside.rename(file)


@pytest.mark.parametrize("name", ["model.pt", "detections.npz", "metrics.jsonl", "record.json", "skip.json"])
def test_a_file_of_the_run_that_is_gone_or_cut_is_a_doubt(told, name):
    cfg, folder = told
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    assert known(cfg) is None
    (folder / name).write_bytes(content[: len(content) // 2])
    assert known(cfg) is None
    (folder / name).write_bytes(content)
    assert known(cfg)


@pytest.mark.parametrize("change", [{"status": "failed  "}, {"fingerprint": "0123456789abcdef"}])
def test_another_record_of_the_same_length_is_a_doubt(told, change):
    cfg, folder = told
    content = (folder / "record.json").read_text()
    ((key, value),) = change.items()
    (folder / "record.json").write_text(content.replace(json.dumps(record.read(folder)[key]), json.dumps(value), 1))
    assert len((folder / "record.json").read_text()) == len(content)
    assert known(cfg) is None
    (folder / "record.json").write_text(content)


def test_another_configuration_machine_program_or_place_is_a_doubt(told, monkeypatch, tmp_path):
    cfg, _ = told
    recipe = cfg.recipe.model_copy(update={"flip": not cfg.recipe.flip})
    for change in ({"recipe": recipe}, {"device": "auto"}, {"deterministic": False}, {"weights": "x"}):
        assert known(cfg.model_copy(update=change)) is None, change
    for change in ({"threads": 7}, {"workers": 3}):
        assert known(cfg.model_copy(update=change)), change
    for name, value in (("_machine", ["another"]), ("_machine", None), ("_program", ["another"])):
        with monkeypatch.context() as patch:
            patch.setattr(skip, name, lambda *asked, value=value: value)
            assert known(cfg) is None
    monkeypatch.chdir(tmp_path)
    assert known(cfg) is None


def test_a_machine_that_torch_alone_knows_is_a_doubt(monkeypatch):
    assert skip._machine.__wrapped__("auto") and skip._machine.__wrapped__("cpu")
    monkeypatch.setattr(skip, "_UNKNOWN", ("nul*",))  # as if /dev/null were such a device
    assert skip._machine.__wrapped__("auto") is None


def test_what_was_written_while_it_was_read_is_not_vouched_for(told, cell):
    cfg, folder = told
    (folder / "skip.json").unlink()
    rewritten(Path(cfg.data.root, "annotations/instances_train.json"))
    skip.write_skip_entry(cfg, cell[1], cell[2]["fingerprint"], time.time())
    assert not (folder / "skip.json").exists()


def test_the_sure_way_leaves_word_anew(told, monkeypatch):
    cfg, _ = told
    rewritten(Path(cfg.data.root, "../weights.pth"))
    assert known(cfg) is None
    monkeypatch.setattr(stamps, "RECENT", -LATER)
    running.run(cfg)
    assert known(cfg)


def test_the_rows_of_a_sweep_read_a_set_once_and_again_when_it_has_changed(cell, monkeypatch):
    cfg = cell[0]
    monkeypatch.setattr(inputs, "_last", [])
    assert inputs.load_data(cfg)[0] is not inputs.load_data(cfg)[0]  # it was just made: it may change and look the same
    monkeypatch.setattr(stamps, "RECENT", -LATER)
    first = inputs.load_data(cfg)
    other_row = cfg.model_copy(update={"seed": 5, "row": "x"})
    assert all(a is b for a, b in zip(inputs.load_data(other_row), first, strict=True))
    rewritten(next(Path(cfg.data.root).rglob("instances_val.json")))
    second = inputs.load_data(cfg)
    assert second[1] is not first[1] and second[1].digest == first[1].digest
    kept = inputs.load_data(cfg.model_copy(update={"data": cfg.data.model_copy(update={"keep_empty": False})}))
    assert kept[0] is not second[0]
    assert inputs.load_data(cfg.model_copy(update={"mode": "evaluate"}))[0] is not kept[1]


SECOND = """
import sys
from fpn_ablate.cli.run import main
sys.argv = ["fpn-ablate"]
code = main(sys.stdin.read().split())
print("code", code, "loaded", sorted({"torch", "torchvision", "matplotlib", "altair"} & set(sys.modules)))
"""


def test_the_second_start_of_a_sweep_imports_no_torch_and_draws_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fpn-ablate"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    rows = [*TINY, "data.train_images=2", "ablation=fpn,c5"]

    def again(*arguments):
        done = subprocess.run([sys.executable, "-c", SECOND], input=" ".join(arguments), text=True, capture_output=True)
        return done.stdout, done.stdout.count("finished before")

    assert main(["-m", *rows]) == 0
    first = capsys.readouterr().out
    out, before = again("-m", *rows)
    assert before == 2 and out.endswith("code 0 loaded []\n"), out
    assert [line for line in first.splitlines() if "│" in line] == [line for line in out.splitlines() if "│" in line]
    assert "up to date: table1_rpn-shapes-" in out
    out, before = again(*rows[:-1], "ablation=c5")
    assert before == 1 and "loaded ['matplotlib'" not in out and "torch" not in out.splitlines()[-1], out

    # What is missing is made again, and a row that is not finished is the launcher's alone.
    file = next(Path("results/tables").glob("*.md"))
    text = file.read_text()
    file.unlink()
    assert main(["-m", *rows]) == 0
    assert "written: " in capsys.readouterr().out and file.read_text() == text
    monkeypatch.setattr("fpn_ablate.runs.run.run", lambda cfg, job: print(f"asked for {cfg.row}, {job}"))
    assert main(["-m", *rows[:-1], "ablation=fpn,c4,c5"]) == 0
    out = capsys.readouterr().out
    assert "asked for c4, 0" in out and out.count("asked for") == 1 and out.count("finished before") == 2

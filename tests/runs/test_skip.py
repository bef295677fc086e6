"""Finished runs are skipped by what is on the disk; in any doubt everything is read again."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from settings import TINY

from fpn_ablate.cli.main import main
from fpn_ablate.cli.shapes import main as export_shapes
from fpn_ablate.config.schema import UserPart
from fpn_ablate.engine import inputs
from fpn_ablate.model.build import build_backbone
from fpn_ablate.model.init import initialise
from fpn_ablate.runs import run as running
from fpn_ablate.runs import skip
from fpn_ablate.store import record
from fpn_ablate.store.layout import run_folder
from fpn_ablate.utils import stamps

LATER = 10.0  # seconds from now: by then all files that a test has just made are old


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """A finished run on a COCO-format set, from a file of weights: its configuration, inputs, record and folder."""
    place = tmp_path_factory.mktemp("finished")
    export_shapes(["--export", str(place / "set"), "--train", "3", "--val", "2", "--size", "64"])
    backbone = build_backbone(config().backbone)
    initialise(backbone, 0)
    torch.save(backbone.state_dict(), place / "weights.pth")
    tiny = [override for override in TINY if not override.startswith("data.")]
    files = ("data=coco", f"data.root={place / 'set'}", f"backbone.weights={place / 'weights.pth'}")
    cfg = config(*tiny, *files).model_copy(update={"out": str(place / "results")})
    outcome = running.run(cfg)
    return cfg, inputs.prepare(cfg), outcome, run_folder(cfg, outcome["fingerprint"])


@pytest.fixture
def entered(finished):
    """Its configuration and folder, with a skip entry of all files as they are now."""
    cfg, loaded, outcome, folder = finished
    skip.write_skip_entry(cfg, loaded, outcome["fingerprint"], time.time() + LATER)
    assert skip.finished_record(cfg) == record.read(folder)
    return cfg, folder


def skipped(cfg):
    stamps.stamp_of.cache_clear()  # as in another process
    return skip.finished_record(cfg)


def rewritten(file: Path) -> None:
    """Another file of equal size, and of the same time as far as its writer can choose it."""
    before, content = file.stat(), file.read_bytes()
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("pattern", ["set/**/instances_train.json", "set/**/instances_val.json", "set/**/*.png", "weights.pth"])
def test_a_file_that_was_written_again_is_a_doubt(entered, pattern):
    cfg, _ = entered
    rewritten(next(Path(cfg.data.root).parent.glob(pattern)))
    assert skipped(cfg) is None


def test_a_picture_more_or_less_is_a_doubt(entered, finished):
    cfg, _ = entered
    picture = next(Path(cfg.data.root).rglob("*.png"))
    aside = picture.rename(Path(cfg.data.root, "aside.png"))
    assert skipped(cfg) is None
    aside.rename(picture)
    skip.write_skip_entry(cfg, finished[1], finished[2]["fingerprint"], time.time() + LATER)
    assert skipped(cfg)
    (picture.parent / "another.png").write_bytes(b"")
    assert skipped(cfg) is None
    (picture.parent / "another.png").unlink()


@pytest.mark.parametrize("name", ["annotations/instances_train.json", "../weights.pth"])
def test_a_file_that_is_gone_is_a_doubt(entered, name):
    cfg, _ = entered
    file = Path(cfg.data.root, name)
    aside = file.rename(file.with_name("aside"))
    assert skipped(cfg) is None
    aside.rename(file)


@pytest.mark.parametrize("name", ["model.pt", "detections.npz", "metrics.jsonl", "record.json", "skip.json"])
def test_a_file_of_the_run_that_is_gone_or_cut_is_a_doubt(entered, name):
    cfg, folder = entered
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    assert skipped(cfg) is None
    (folder / name).write_bytes(content[: len(content) // 2])
    assert skipped(cfg) is None
    (folder / name).write_bytes(content)
    assert skipped(cfg)


@pytest.mark.parametrize("change", [{"status": "failed  "}, {"fingerprint": "0123456789abcdef"}])
def test_another_record_of_the_same_length_is_a_doubt(entered, change):
    cfg, folder = entered
    content = (folder / "record.json").read_text()
    ((key, value),) = change.items()
    (folder / "record.json").write_text(content.replace(json.dumps(record.read(folder)[key]), json.dumps(value), 1))
    assert len((folder / "record.json").read_text()) == len(content)
    assert skipped(cfg) is None
    (folder / "record.json").write_text(content)


def test_another_configuration_machine_program_or_place_is_a_doubt(entered, monkeypatch, tmp_path):
    cfg, _ = entered
    recipe = cfg.recipe.model_copy(update={"flip": not cfg.recipe.flip})
    for change in ({"recipe": recipe}, {"device": "auto"}, {"deterministic": False}, {"weights": "x"}):
        assert skipped(cfg.model_copy(update=change)) is None, change
    for change in ({"threads": 7}, {"workers": 3}):
        assert skipped(cfg.model_copy(update=change)), change
    for name, value in (("_machine", ["another"]), ("_machine", None), ("_program", ["another"])):
        with monkeypatch.context() as patch:
            patch.setattr(skip, name, lambda *device, value=value: value)
            assert skipped(cfg) is None
    monkeypatch.chdir(tmp_path)
    assert skipped(cfg) is None


def test_the_code_of_a_users_part_is_part_of_the_request_and_a_doubt_where_it_cannot_be_read(entered, finished, tmp_path):
    cfg, _ = entered
    (tmp_path / "necks.py").write_text("from .helper import WIDTH\nclass PathAggregation: ...\n")
    (tmp_path / "helper.py").write_text("WIDTH = 1\n")

    def with_part(folder):
        part = UserPart.model_validate({"class": "necks.PathAggregation"}, context={"config_dir": folder})
        return cfg.model_copy(update={"neck": part})

    user = with_part(tmp_path)
    # As if the finished run had this neck: an entry in the folder where it would be looked for.
    skip.write_skip_entry(user, finished[1], finished[2]["fingerprint"], time.time() + LATER)
    assert skipped(user)
    for name in ("necks.py", "helper.py"):
        content = (tmp_path / name).read_text()
        (tmp_path / name).write_text(f"{content}\nANOTHER = 1\n")
        assert skipped(user) is None
        (tmp_path / name).write_text(content)
        assert skipped(user) is None  # written again, as any other file
        skip.write_skip_entry(user, finished[1], finished[2]["fingerprint"], time.time() + LATER)
        assert skipped(user)
    before = skip.request_digest(user)
    (tmp_path / "helper.py").write_text("WIDTH = 2\n")
    assert skip.request_digest(user) != before
    (tmp_path / "helper.py").write_text("WIDTH =")
    assert skipped(user) is None and skipped(with_part(None)) is None


def test_a_users_file_that_was_edited_during_the_run_gets_no_entry(entered, finished, tmp_path, monkeypatch):
    cfg, folder = entered
    (tmp_path / "necks.py").write_text("class PathAggregation: ...\n")
    part = UserPart.model_validate({"class": "necks.PathAggregation"}, context={"config_dir": tmp_path})
    (folder / "skip.json").unlink()
    monkeypatch.setattr(skip, "is_recent", lambda stamps, start: str(tmp_path / "necks.py") in stamps)
    skip.write_skip_entry(cfg.model_copy(update={"neck": part}), finished[1], finished[2]["fingerprint"], time.time())
    assert not (folder / "skip.json").exists()


def test_a_machine_that_torch_alone_knows_is_a_doubt(monkeypatch):
    assert skip._machine.__wrapped__("auto") and skip._machine.__wrapped__("cpu")
    monkeypatch.setattr(skip, "_UNKNOWN", ("nul*",))  # as if /dev/null were such a device
    assert skip._machine.__wrapped__("auto") is None


def test_a_file_written_while_it_was_read_gets_no_entry(entered, finished):
    cfg, folder = entered
    (folder / "skip.json").unlink()
    rewritten(Path(cfg.data.root, "annotations/instances_train.json"))
    skip.write_skip_entry(cfg, finished[1], finished[2]["fingerprint"], time.time())
    assert not (folder / "skip.json").exists()


def test_a_run_that_reads_everything_writes_the_entry_again(entered, monkeypatch):
    cfg, _ = entered
    rewritten(Path(cfg.data.root, "../weights.pth"))
    assert skipped(cfg) is None
    monkeypatch.setattr(stamps, "RECENT", -LATER)
    running.run(cfg)
    assert skipped(cfg)


def test_the_rows_of_a_sweep_read_a_set_once_and_again_when_it_has_changed(finished, monkeypatch):
    cfg = finished[0]

    def load(data=cfg.data, mode="train"):
        return inputs.load_data(data, cfg.recipe, mode)

    monkeypatch.setattr(inputs, "_cache", [])
    rewritten(next(Path(cfg.data.root).rglob("instances_val.json")))
    assert load()[0] is not load()[0]  # the set was just made: it may change and look the same
    monkeypatch.setattr(stamps, "RECENT", -LATER)
    first = load()
    assert all(a is b for a, b in zip(load(), first, strict=True))
    rewritten(next(Path(cfg.data.root).rglob("instances_val.json")))
    second = load()
    assert second[1] is not first[1] and second[1].digest == first[1].digest
    other = load(cfg.data.model_copy(update={"keep_empty": False}))
    assert other[0] is not second[0]
    assert load(mode="evaluate")[0] is not other[1]


SECOND = """
import sys
from fpn_ablate.cli.main import main
code = main(sys.stdin.read().split())
print("code", code, "loaded", sorted({"torch", "torchvision", "matplotlib", "altair"} & set(sys.modules)))
"""


def test_the_second_start_of_a_sweep_imports_no_torch_and_draws_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fpn-ablate"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    tiny = [override for override in TINY if override != "backbone.weights=none"]
    rows = [*tiny, "recipe.pretrain.steps=2", "ablation=fpn,c5"]

    def in_another_process(*arguments):
        done = subprocess.run([sys.executable, "-c", SECOND], input=" ".join(arguments), text=True, capture_output=True)
        return done.stdout, done.stdout.count("finished before")

    assert main(["-m", *rows]) == 0
    first = capsys.readouterr().out
    assert list(Path("results/backbones").glob("*.pt"))
    out, before = in_another_process("-m", *rows)
    assert before == 2 and out.endswith("code 0 loaded []\n"), out
    assert [line for line in first.splitlines() if "│" in line] == [line for line in out.splitlines() if "│" in line]
    assert "up to date: table1_rpn-shapes-" in out
    out, before = in_another_process(*rows[:-1], "ablation=c5")
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

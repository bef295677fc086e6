"""Finished runs are skipped by what is on the disk; in any doubt everything is read again."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from coco_sets import split, write_splits
from PIL import Image
from settings import TINY

from fpn_ablate.cli.main import main
from fpn_ablate.cli.shapes import main as export_shapes
from fpn_ablate.config.parts import UserPart
from fpn_ablate.engine import inputs
from fpn_ablate.model.build import build_backbone
from fpn_ablate.model.init import initialise
from fpn_ablate.runs import run as running
from fpn_ablate.runs import skip
from fpn_ablate.runs.state import Run
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


@pytest.fixture
def enter_again(finished):
    """Write the skip entry as if no file had changed lately; with a configuration that differs from the run's."""
    _, loaded, outcome, _ = finished
    return lambda cfg: skip.write_skip_entry(cfg, loaded, outcome["fingerprint"], time.time() + LATER)


READ = ("set/annotations/instances_train.json", "set/annotations/instances_val.json", "set/**/*.png", "weights.pth")
MADE = ("model.pt", "detections.npz", "metrics.jsonl", "record.json")


@pytest.mark.parametrize("pattern", [*READ, *(f"results/**/{name}" for name in (*MADE, "skip.json"))])
def test_a_file_that_is_gone_cut_or_written_again_is_a_doubt(entered, enter_again, pattern):
    cfg, _ = entered
    file = next(Path(cfg.data.root).parent.glob(pattern))
    content = file.read_bytes()
    file.unlink()
    assert skipped(cfg) is None
    file.write_bytes(content[: len(content) // 2])
    assert skipped(cfg) is None
    file.write_bytes(content)
    enter_again(cfg)
    assert skipped(cfg)
    if file.name != "skip.json":
        rewritten(file)
        assert skipped(cfg) is None


def test_a_picture_more_is_a_doubt(entered):
    cfg, _ = entered
    another = next(Path(cfg.data.root).rglob("*.png")).with_name("another.png")
    another.write_bytes(b"")
    assert skipped(cfg) is None
    another.unlink()


def test_another_configuration_machine_program_or_place_is_a_doubt(entered, monkeypatch, tmp_path):
    cfg, _ = entered
    recipe = cfg.recipe.model_copy(update={"flip": not cfg.recipe.flip})
    for change in ({"recipe": recipe}, {"device": "auto"}, {"deterministic": False}, {"weights": "x"}, {"threads": 7}):
        assert skipped(cfg.model_copy(update=change)) is None, change
    assert skipped(cfg.model_copy(update={"workers": 3}))
    for name in ("_machine", "_program"):
        with monkeypatch.context() as patch:
            patch.setattr(skip, name, lambda *_: ["another"])
            assert skipped(cfg) is None


@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_a_run_on_a_gpu_is_known_whichever_gpu_is_visible_and_where_jobs_are_sent_from(
    entered, enter_again, monkeypatch, device
):
    """`auto` means a GPU only where one is visible."""
    cfg = entered[0].model_copy(update={"device": device})
    made_on = entered[1] / "record.json"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    enter_again(cfg)
    for visible, known in [("3", True), ("5", True), ("0,1", True), ("", device == "cuda")]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert bool(skipped(cfg)) == known, visible
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    name = json.loads(made_on.read_text())["environment"]["device"]
    for models, known in [({name}, True), ({"another"}, False), ({"another", name}, True)]:
        monkeypatch.setattr(skip, "gpu_models", lambda models=models: models)
        assert bool(skipped(cfg)) == known, models


def test_a_run_on_a_processor_is_known_whichever_gpu_is_visible(entered, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert skipped(entered[0])


def test_another_place_is_a_doubt(entered, monkeypatch, tmp_path):
    cfg, _ = entered
    monkeypatch.chdir(tmp_path)
    assert skipped(cfg) is None


@pytest.fixture
def user(entered, tmp_path):
    """The configuration with a neck of the user's, which imports a helper."""
    (tmp_path / "necks.py").write_text("from .helper import WIDTH\nclass PathAggregation: ...\n")
    (tmp_path / "helper.py").write_text("WIDTH = 1\n")
    part = UserPart.model_validate({"class": "necks.PathAggregation"}, context={"config_dir": tmp_path})
    return entered[0].model_copy(update={"neck": part})


@pytest.mark.parametrize("name", ["necks.py", "helper.py"])
def test_the_code_of_a_users_part_is_part_of_the_request_and_a_doubt_where_it_cannot_be_read(user, enter_again, tmp_path, name):
    enter_again(user)  # as if the finished run had this neck
    assert skipped(user)
    before, content = skip.request_digest(user), (tmp_path / name).read_text()
    for other in (f"{content}\nANOTHER = 1\n", content, f"{content}\nWIDTH ="):  # `content`: written again, as any other file
        (tmp_path / name).write_text(other)
        assert skipped(user) is None
    (tmp_path / name).write_text(f"{content}\nANOTHER = 1\n")
    assert skip.request_digest(user) != before
    unbound = UserPart.model_validate({"class": "necks.PathAggregation"})
    assert skipped(user.model_copy(update={"neck": unbound})) is None


@pytest.mark.parametrize("part", [False, True])
def test_a_file_written_while_it_was_read_gets_no_entry(entered, finished, user, tmp_path, part):
    cfg, folder = entered
    (folder / "skip.json").unlink()
    if not part:
        rewritten(Path(cfg.data.root, "annotations/instances_train.json"))
    skip.write_skip_entry(user if part else cfg, finished[1], finished[2]["fingerprint"], time.time())
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

    monkeypatch.setattr(inputs, "_cache", {})
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


def test_pictures_overwritten_by_others_of_equal_size_make_another_run(config, tmp_path):
    """The fingerprint names the folder that a start returns, or resumes."""
    root = write_splits(tmp_path, split([(1, 1, [1, 2, 30, 20], 0)], ["a.bmp"]), split([(1, 1, [1, 2, 30, 20], 0)], ["a.bmp"]))
    tiny = [override for override in TINY if not override.startswith("data.")]
    cfg = config(*tiny, "data=coco", root)
    before, path = Run(cfg, inputs.prepare(cfg), 0), tmp_path / "images/a.bmp"
    stat, size = path.stat(), Image.open(path).size
    Image.new("RGB", size).save(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    after = Run(cfg, inputs.prepare(cfg), 0)
    assert after.folder != before.folder
    assert after.describe()["data_hash"] == {"train": "content", "val": "content"}


SECOND = """
import sys
from fpn_ablate.cli.main import main
code = main(sys.stdin.read().split())
print("code", code, "loaded", sorted({"torch", "torchvision", "matplotlib", "vl_convert"} & set(sys.modules)))
"""


def test_the_second_start_of_a_sweep_imports_no_torch_and_draws_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fpn-ablate"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    tiny = [override.replace("weights=none", "weights=pretrain") for override in TINY]
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
    monkeypatch.setattr("fpn_ablate.runs.run.run", lambda cfg, job, wait: print(f"asked for {cfg.row}, {job}"))
    assert main(["-m", *rows[:-1], "ablation=fpn,c4,c5"]) == 0
    out = capsys.readouterr().out
    assert "asked for c4, 0" in out and out.count("asked for") == 1 and out.count("finished before, results") == 2


def test_a_finished_run_is_skipped_whatever_torchs_own_choice_of_threads(entered, enter_again, monkeypatch):
    """Workers of joblib have another than the sweep; threads=null means the number that a run began with."""
    for cfg in (entered[0], entered[0].model_copy(update={"threads": 1})):
        enter_again(cfg)
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        assert skipped(cfg)
        monkeypatch.delenv("OMP_NUM_THREADS")

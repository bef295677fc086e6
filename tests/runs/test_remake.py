"""A finished run is restored from its folder alone: it detects the same, and its latency can be measured again."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from settings import JOINT, TINY

from fpn_ablate import __version__, engine
from fpn_ablate.cli.main import main
from fpn_ablate.data.loader import evaluation_batches
from fpn_ablate.data.transforms import Resize
from fpn_ablate.engine.evaluate import predict
from fpn_ablate.evaluation.coco import DetectionSet
from fpn_ablate.runs import probe, remake, restore
from fpn_ablate.runs import run as running
from fpn_ablate.runs.environment import device_name
from fpn_ablate.store import record
from fpn_ablate.store.layout import run_folder
from fpn_ablate.utils.errors import UserError

TASKS = {
    "rpn": ["task=rpn"],
    "fast": ["task=fast_rcnn", "ablation=c4"],
    "separate": ["task=faster_rcnn"],
    "joint": JOINT,
    "four_step": ["task=faster_rcnn", "task.training=four_step"],
}


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """Task -> folder of its run, all below one `out`."""
    out, folders = str(tmp_path_factory.mktemp("results")), {}
    for name, task in TASKS.items():
        # An untrained network is sure of nothing.
        overrides = [*TINY, "recipe.roi.steps=2", *task] + ["task.roi.score_thresh=0.0"] * (name != "rpn")
        cfg = config(*overrides).model_copy(update={"out": out})
        folders[name] = run_folder(cfg, running.run(cfg)["fingerprint"])
    return folders


@pytest.mark.parametrize("name", TASKS)
def test_a_restored_run_detects_what_it_detected(finished, name):
    folder = finished[name]
    trained, cfg, device = restore.restore(folder)
    detections = predict(trained.predict, trained.validation, cfg.recipe, device, count=cfg.recipe.eval_images)
    saved = DetectionSet.load(folder / "detections.npz")
    assert len(saved.boxes)
    np.testing.assert_array_equal(detections.boxes, saved.boxes)
    np.testing.assert_array_equal(detections.scores, saved.scores)


@pytest.mark.parametrize("name", TASKS)
def test_what_is_probed_is_what_the_run_computes(finished, name):
    trained, cfg, device = restore.restore(finished[name])
    batch = next(evaluation_batches(trained.validation, resize=Resize.of(cfg.recipe), batch_size=2, count=2))
    with torch.no_grad():
        expected = trained.model.features(batch.images, batch.sizes)
        features = probe.load_trunk(finished[name], cfg, device).features(batch.images, batch.sizes)
    assert features.keys() == expected.keys()
    for level in expected:  # the frozen batch norm of four_step rounds differently
        torch.testing.assert_close(features[level], expected[level])


def test_separate_makes_its_own_proposals_for_the_latency(finished):
    trained, _, _ = restore.restore(finished["separate"])
    splits = (trained.validation.dataset, trained.validation)
    bare, fixed = (next(evaluation_batches(split, batch_size=1, count=1, resize=Resize(64, 128))) for split in splits)
    assert bare.proposals is None and trained.model.rpn is None
    # Fixed proposals went to native pixels and back, so not to the bit.
    torch.testing.assert_close(trained.predict_end_to_end(bare).boxes, trained.predict(fixed).boxes)


def test_only_the_latency_of_a_record_changes(finished, capsys, monkeypatch):
    monkeypatch.setattr(remake, "end_to_end_latency_ms", lambda *_: 12.5)
    before = {name: record.read(folder) for name, folder in finished.items()}
    out = finished["rpn"].parents[4]
    assert main(["measure", str(out / "runs"), f"{out}/runs/../runs"]) == 0  # each run once
    assert capsys.readouterr().out.count("12.5 ms, was") == len(list(Path(out).rglob("record.json")))
    for name, folder in finished.items():
        after = record.read(folder)
        assert after["cost"].pop("latency_ms") == 12.5
        del before[name]["cost"]["latency_ms"]
        assert after == before[name]


def test_what_cannot_be_measured_is_left_as_it_was(finished, capsys, tmp_path):
    folder = finished["rpn"]
    content = record.read(folder)
    on_a_gpu = {**content, "environment": {**content["environment"], "device": "a GPU"}}
    for other, reason in (({**content, "bf16": True}, "made in bf16"), (on_a_gpu, "made on a GPU")):
        (folder / "record.json").write_text(json.dumps(other))
        text = (folder / "record.json").read_text()
        assert main(["measure", str(folder)]) == 2
        assert reason in capsys.readouterr().err
        assert (folder / "record.json").read_text() == text
    assert main(["measure", str(tmp_path)]) == 2


def report_of(tmp_path, *folders):
    assert main(["probe", *map(str, folders), "--json", str(tmp_path / "probe.json")]) == 0
    return json.loads((tmp_path / "probe.json").read_text())


def edited_copy(run, tmp_path, old="seed: 0", new="seed: 0"):
    """Copy a run, as of an older version that recorded no digests of its data, with another configuration."""
    folder = Path(shutil.copytree(run, tmp_path / "copy", dirs_exist_ok=True))
    text = (folder / "config.yaml").read_text()
    assert old in text
    (folder / "config.yaml").write_text(text.replace(old, new))
    (folder / "record.json").write_text(json.dumps(record.read(folder) | {"data_digest": None}))
    return folder


def test_runs_of_every_task_are_probed_on_the_same_places(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(engine.probe, "FEWEST", 1)  # TINY has few objects
    monkeypatch.setenv("COLUMNS", "80")
    report = report_of(tmp_path, *finished.values())
    levels = {Path(run["folder"]): list(run["levels"]) for run in report["runs"]}
    assert levels == {folder: ["c4"] if name == "fast" else ["p2", "p3", "p4", "p5", "p6"] for name, folder in finished.items()}
    accuracies = [run["levels"][level]["small"]["object"] for run in report["runs"] for level in run["levels"]]
    assert all(0 <= a["low"] <= a["value"] <= a["high"] <= 1 for a in accuracies)
    background = "distractors of their size, told apart by the time of day"
    assert (report["pictures"], report["background"], report["version"]) == ({"train": 2, "val": 2}, background, __version__)
    assert {run["device"] for run in report["runs"]} == {device_name(torch.device("cpu"))}
    printed = capsys.readouterr().out
    widths = {level: number for run in report["runs"] for level, number in run["features"].items()}
    assert printed.count("\np") == 20 and printed.count("\nc4") == 1
    assert printed.count(f"\np2 ({widths['p2']})") == 4 and f"\nc4 ({widths['c4']})" in printed
    assert widths["p2"] != widths["c4"] and max(len(line) for line in printed.splitlines() if "|" in line) <= 80
    # Rows of one name and seed are told apart.
    for n, (name, folder) in enumerate(finished.items(), start=1):
        assert name == "fast" or (printed.count(f"fpn #{n} ") == 5 and f"fpn #{n}: {folder}\n" in printed)
    alone = report_of(tmp_path, finished["joint"])
    assert alone == {**report, "runs": [run for run in report["runs"] if run["folder"] == str(finished["joint"])]}
    folder = edited_copy(finished["rpn"], tmp_path, "context: true", "context: false")
    assert report_of(tmp_path, folder)["background"] == "distractors of their size, told apart by their marks (no context)"


def test_an_evaluated_run_is_probed_as_the_run_that_trained_it(finished, config, tmp_path):
    cfg = config(*TINY, *JOINT, "mode=evaluate", f"weights={finished['joint']}").model_copy(update={"out": str(tmp_path)})
    trained, evaluated = report_of(tmp_path, finished["joint"], run_folder(cfg, running.run(cfg)["fingerprint"]))["runs"]
    assert evaluated["levels"] == trained["levels"]


def test_a_run_that_cannot_be_probed_is_refused_in_words(finished, tmp_path, capsys):
    def complaint(*folders, code=2):
        assert main(["probe", *map(str, folders)]) == code
        return capsys.readouterr().err

    assert "no readable record.json" in complaint(tmp_path)
    original = finished["rpn"]
    folder = edited_copy(original, tmp_path, "train_images: 2", "train_images: 3")
    assert "different data" in complaint(original, folder)
    shutil.copy(original / "record.json", folder)
    assert "the split 'train', have changed since" in complaint(folder)
    if not torch.cuda.is_available():
        assert "device=cuda: torch sees no GPU" in complaint(edited_copy(original, tmp_path, "device: cpu", "device: cuda"))
    folder = edited_copy(original, tmp_path)
    (folder / "model.pt").write_bytes(b"PK\x03\x04cut off")
    assert f"{folder / 'model.pt'}: cannot be read" in complaint(folder)
    (folder / "record.json").write_text(json.dumps(record.read(folder) | {"status": "interrupted"}))
    assert "the run is interrupted, not finished" in complaint(folder)
    with pytest.raises(SystemExit, match="2"):
        main(["probe", str(folder), "--pictures", "0"])


@pytest.mark.parametrize(
    "change", [{"images": None}, {"images": {"count": "x", "digest": "d"}}, {"environment": {"device": "cpu"}}]
)
def test_a_damaged_record_is_refused_by_its_key(finished, tmp_path, change):
    folder = tmp_path / "run"
    shutil.copytree(finished["rpn"], folder)
    record.write(folder, record.read(folder) | change)
    with pytest.raises(UserError, match=r"record\.json: key '(images\.count|environment\.threads)' must be int"):
        restore.read_finished(folder)

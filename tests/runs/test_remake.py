"""A finished run is restored from its folder alone: it finds what it found, and its latency can be measured again."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fpn_ablate.cli import measure
from fpn_ablate.data.loader import evaluation_batches
from fpn_ablate.engine.evaluate import predict
from fpn_ablate.evaluation.coco import DetectionSet
from fpn_ablate.runs import restore
from fpn_ablate.runs import run as running
from fpn_ablate.store import record

TINY = (
    *("backbone.weights=none", "backbone.freeze_at=0", "backbone.frozen_bn=false"),
    *("recipe.eval_images=3", "data.train_images=4", "device=cpu"),
)
TASKS = {
    "rpn": ["task=rpn"],
    "fast": ["task=fast_rcnn", "ablation=c4"],
    "separate": ["task=faster_rcnn"],
    "joint": ["task=faster_rcnn", "task.training=joint"],
    "four_step": ["task=faster_rcnn", "task.training=four_step"],
}


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """Task -> folder of its run, all below one `out`."""
    out, folders = str(tmp_path_factory.mktemp("results")), {}
    for name, task in TASKS.items():
        # An untrained network is sure of nothing.
        overrides = [*TINY, *task] + ["task.roi.score_thresh=0.0"] * (name != "rpn")
        cfg = config(*overrides).model_copy(update={"out": out})
        folders[name] = running.run_folder(cfg, running.run(cfg)["fingerprint"])
    return folders


@pytest.mark.parametrize("name", TASKS)
def test_a_restored_run_finds_what_it_found(finished, name):
    folder = finished[name]
    trained, cfg, device = restore.restore(folder, {})
    found, saved = predict(trained.answer, trained.validation, cfg, device, 3), DetectionSet.load(folder / "detections.npz")
    assert len(saved.boxes)
    np.testing.assert_array_equal(found.boxes, saved.boxes)
    np.testing.assert_array_equal(found.scores, saved.scores)


def test_separate_makes_its_own_proposals_for_the_latency(finished):
    trained, _, _ = restore.restore(finished["separate"], {})
    sizes = {"batch_size": 1, "count": 1, "short_side": 64, "max_side": 128}
    bare, given = (next(evaluation_batches(data, **sizes)) for data in (trained.validation.dataset, trained.validation))
    assert bare.proposals is None and trained.model.rpn is None
    torch.testing.assert_close(trained.whole(bare).boxes, trained.answer(given).boxes)  # native and back: not to the bit


def test_only_the_latency_of_a_record_changes(finished, capsys, monkeypatch):
    monkeypatch.setattr(measure, "latency_of", lambda *_: 12.5)
    before = {name: record.read(folder) for name, folder in finished.items()}
    out = finished["rpn"].parents[4]
    assert measure.main([str(out / "runs")]) == 0
    assert capsys.readouterr().out.count("12.5 ms, was") == len(list(Path(out).rglob("record.json")))
    for name, folder in finished.items():
        after = record.read(folder)
        assert after["cost"].pop("latency_ms") == 12.5
        del before[name]["cost"]["latency_ms"]
        assert after == before[name]


def test_what_cannot_be_measured_is_left_as_it_was(finished, capsys, tmp_path):
    folder = finished["rpn"]
    known = record.read(folder)
    (folder / "record.json").write_text(json.dumps({**known, "environment": {**known["environment"], "device": "a GPU"}}))
    text = (folder / "record.json").read_text()
    assert measure.main([str(folder)]) == 2
    assert "made on a GPU" in capsys.readouterr().err
    assert (folder / "record.json").read_text() == text
    assert measure.main([str(tmp_path)]) == 2

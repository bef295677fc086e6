"""task=retinanet from the command to its record: trained, evaluated, evaluated again from its weights, resumed."""

import json

import numpy as np
import pytest
import torch
from settings import TINY

from fpn_ablate.evaluation.coco import DetectionSet
from fpn_ablate.runs import run as running
from fpn_ablate.store.layout import run_folder

ROW = (*TINY, "ablation=retinanet/focal", "recipe.steps=2", "task.score_thresh=0.0", "task.detections=10", "task.norm=gn")


@pytest.fixture(autouse=True)
def no_measurements(monkeypatch):
    """As in test_procedures.py."""
    monkeypatch.setattr(running, "end_to_end_latency_ms", lambda *_: 1.0)
    monkeypatch.setattr(running, "reset_peak_memory", lambda *_: None)


def test_a_row_is_trained_evaluated_and_evaluated_again_from_its_weights(config, tmp_path):
    cfg = config(*ROW, "task.normaliser=moving").model_copy(update={"out": str(tmp_path)})
    record = running.run(cfg)
    assert (record["status"], record["table"], record["task"], record["cost"]["steps"]) == (
        "finished",
        "retinanet",
        "retinanet",
        2,
    )
    assert record["metrics"].keys() >= {"AP", "AP50", "AP_s", "AR100"} and "proposals" not in record
    assert record["verify"]["head"] == "retinanet" and record["verify"]["anchors"] == 150426
    assert "fpn_ablate.model.heads.retinanet" in record["parts"]
    folder = run_folder(cfg, record["fingerprint"])
    losses = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"class", "box"} <= losses[0].keys()
    assert torch.load(folder / "model.pt")["head.moving_positives"] < 100
    before = DetectionSet.load(folder / "detections.npz")
    assert before.labels is not None and len(before.boxes) > 0

    # Another normaliser changes no detection; its counter is left out.
    evaluated = config(*ROW, "mode=evaluate", f"weights={folder}").model_copy(update={"out": str(tmp_path)})
    again = running.run(evaluated)
    assert again["table"] == "evaluated_retinanet" and again["metrics"] == record["metrics"]
    np.testing.assert_array_equal(
        DetectionSet.load(run_folder(evaluated, again["fingerprint"]) / "detections.npz").boxes, before.boxes
    )

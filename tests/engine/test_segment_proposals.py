"""Segment proposals from the configuration to the record: masks are trained, pasted, evaluated, saved and restored."""

import numpy as np
import pytest
from settings import SHORT

from fpn_ablate.engine.evaluate import predict
from fpn_ablate.evaluation.coco import DetectionSet
from fpn_ablate.runs import run as running
from fpn_ablate.runs.restore import restore
from fpn_ablate.store.layout import run_folder
from fpn_ablate.utils import rle

TASK = (*SHORT, "task=segment_proposals", "task.proposals=20", "task.schedule=2", "recipe.steps=2", "ablation=segments/mlp_5")


@pytest.fixture(autouse=True)
def no_measurements(monkeypatch):
    """As in test_procedures.py."""
    monkeypatch.setattr(running, "end_to_end_latency_ms", lambda *_: 1.0)
    monkeypatch.setattr(running, "end_to_end_memory_mib", lambda *_: 1)
    monkeypatch.setattr(running, "reset_peak_memory", lambda *_: None)


def test_a_run_is_evaluated_on_its_masks_and_restored_and_evaluated_again_from_its_weights(config, tmp_path):
    cfg = config(*TASK).model_copy(update={"out": str(tmp_path / "results")})
    record = running.run(cfg)
    assert (record["status"], record["cost"]["steps"], record["verify"]["head"]) == ("finished", 4, "5x5")
    assert set(record["metrics"]) == {f"AR{k}{size}" for k in ("100", "1k") for size in ("", "_s", "_m", "_l")}
    folder = run_folder(cfg, record["fingerprint"])
    saved = DetectionSet.load(folder / "detections.npz")
    assert len(saved.masks) == len(saved.boxes) == 3 * 20 and saved.labels is None

    trained, restored, device = restore(folder)
    assert restored.task == cfg.task
    again = predict(trained.predict, trained.validation, cfg.recipe, device, count=3)
    assert again.masks == saved.masks and np.array_equal(again.boxes, saved.boxes)
    # A lower threshold adds pixels to masks.
    assert trained.mask_threshold == 0.5
    lower = predict(trained.predict, trained.validation, cfg.recipe, device, count=3, mask_threshold=0.2)
    size = tuple(trained.validation.sizes[0])
    areas, more = (rle.areas(masks, size).sum() for masks in (saved.masks, lower.masks))
    assert more > areas

    evaluated = config("mode=evaluate", f"weights={folder}", *TASK, "task.mask_threshold=0.2")
    evaluated = evaluated.model_copy(update={"out": str(tmp_path / "evaluated")})
    record = running.run(evaluated)
    assert DetectionSet.load(run_folder(evaluated, record["fingerprint"]) / "detections.npz").masks == lower.masks

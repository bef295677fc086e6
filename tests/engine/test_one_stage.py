"""FCOS, YOLOv3 and SSD from the configuration to the record: trained, evaluated, saved, restored; fast equals plain."""

import copy

import numpy as np
import pytest
import torch
from settings import SHORT

from fpn_ablate.engine.evaluate import predict
from fpn_ablate.evaluation.coco import DetectionSet
from fpn_ablate.model.build import build_detector
from fpn_ablate.model.init import initialise
from fpn_ablate.model.optimise import optimise
from fpn_ablate.runs import run as running
from fpn_ablate.runs.restore import restore
from fpn_ablate.store.layout import run_folder
from fpn_ablate.structures.instances import Targets
from fpn_ablate.utils.errors import UserError

EACH = pytest.mark.parametrize(("task", "row"), [("fcos", "fpn"), ("yolo", "c4"), ("ssd", "ssd")])
RUN = (
    *(*SHORT, "recipe.steps=2", "task.detections=20", "task.proposals=30", "task.score_thresh=0.0"),
    "task.proposal_recall=true",
)


@pytest.fixture(autouse=True)
def no_measurements(monkeypatch):
    """As in test_procedures.py."""
    monkeypatch.setattr(running, "end_to_end_latency_ms", lambda *_: 1.0)
    monkeypatch.setattr(running, "end_to_end_memory_mib", lambda *_: 1)
    monkeypatch.setattr(running, "reset_peak_memory", lambda *_: None)


@EACH
def test_a_run_is_evaluated_as_detector_and_as_proposer_and_restored_from_its_weights(config, tmp_path, task, row):
    cfg = config(*RUN, f"task={task}", f"ablation={row}").model_copy(update={"out": str(tmp_path / "results")})
    record = running.run(cfg)
    assert (record["status"], record["cost"]["steps"], record["verify"]["head"]) == ("finished", 2, task)
    assert {"AP", "AP_s", "AR100", "proposal_AR100", "proposal_AR1k_s"} <= set(record["metrics"])
    folder = run_folder(cfg, record["fingerprint"])
    saved = DetectionSet.load(folder / "detections.npz")
    assert len(saved.boxes) == 3 * 20 and set(saved.labels.tolist()) <= {1, 2, 3}
    trained, restored, device = restore(folder)
    assert restored.task == cfg.task
    again = predict(trained.predict, trained.validation, cfg.recipe, device, count=3)
    assert np.array_equal(again.boxes, saved.boxes) and np.array_equal(again.labels, saved.labels)


@EACH
def test_fast_equals_plain(config, task, row):
    cfg = config("recipe.short_side=96", f"task={task}", f"ablation={row}")
    plain = build_detector(cfg, num_classes=3)
    initialise(plain, 0)
    fast = optimise(copy.deepcopy(plain), torch.device("cpu"))
    images = torch.rand(2, 3, 96, 160, generator=torch.Generator().manual_seed(0)) * 255
    boxes, yes = torch.tensor([[[10.0, 10, 40, 60], [50, 5, 150, 90]]] * 2), torch.ones(2, 2, dtype=torch.bool)
    targets = Targets(boxes, yes.long(), yes, ~yes, torch.tensor([[96, 160], [96, 128]]))
    results = []
    for model in (plain, fast):
        losses = model.train().losses(images, targets, lambda purpose: torch.Generator())
        sum(losses.values()).backward()
        detections = model.eval().detect(images, targets.sizes)
        results.append([*losses.values(), *(p.grad for p in model.parameters() if p.requires_grad), detections.scores])
    assert any(type(a) is not type(b) for a, b in zip(plain.modules(), fast.modules(), strict=True))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_head_that_levels_share_is_refused_levels_of_several_widths(config):
    with pytest.raises(UserError, match="the levels of neck=hierarchy differ in width, and task=fcos has one head for all"):
        config("task=fcos", "neck=hierarchy")
    assert config("task=yolo", "neck=hierarchy").neck.name == "hierarchy"


def test_scales_of_default_boxes_must_grow(config):
    with pytest.raises(UserError, match=r"scales: the first \(0.9\) must be below the second \(0.2\)"):
        config("task=ssd", "task.scales=[0.9,0.2]")

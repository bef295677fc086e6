"""task=mask_rcnn from the command to its record: trained, evaluated, evaluated again from its weights."""

import json
from pathlib import Path

import numpy as np
import pytest
from settings import TINY

from fpn_ablate.evaluation.coco import DetectionSet
from fpn_ablate.runs import run as running
from fpn_ablate.store.layout import run_folder

MASKS = ("task=mask_rcnn", "recipe.roi.steps=2", "task.roi.score_thresh=0.0", "task.roi.detections=10")
METRICS = {f"mask_AP{suffix}" for suffix in ("", "50", "75", "_s", "_m", "_l")}


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    """Train end to end; return the configuration, the record and the folder."""
    out = str(tmp_path_factory.mktemp("results"))
    cfg = config(*TINY, *MASKS, "task.training=joint").model_copy(update={"out": out})
    record = running.run(cfg)
    return cfg, record, run_folder(cfg, record["fingerprint"])


def test_a_run_records_masks_beside_boxes(trained):
    _, record, folder = trained
    assert (record["status"], record["table"], record["verify"]["mask"]) == ("finished", "masks_joint", "fcn")
    assert record["metrics"].keys() >= METRICS | {"AP", "AR100"}
    detections = DetectionSet.load(folder / "detections.npz")
    assert len(detections.masks) == len(detections.boxes) > 0
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert any("mask" in line for line in log)


def test_the_same_masks_come_from_its_weights(trained, config):
    cfg, record, folder = trained
    evaluate = config(*TINY, *MASKS, "mode=evaluate", f"weights={folder}").model_copy(update={"out": cfg.out})
    again = running.run(evaluate)
    assert again["table"] == "evaluated_mask_rcnn" and again["metrics"] == record["metrics"]
    ours, before = (
        DetectionSet.load(place / "detections.npz") for place in (run_folder(evaluate, again["fingerprint"]), folder)
    )
    assert ours.masks == before.masks
    np.testing.assert_array_equal(ours.boxes, before.boxes)


@pytest.mark.slow
@pytest.mark.parametrize("training", ["separate", "four_step"])
def test_other_procedures_train_masks_too(config, tmp_path, training):
    cfg = config(*TINY, *MASKS, f"task.training={training}").model_copy(update={"out": str(tmp_path)})
    record = running.run(cfg)
    assert record["table"] == {"separate": "masks", "four_step": "masks_four_step"}[training]
    assert record["metrics"].keys() >= METRICS


@pytest.mark.slow
def test_the_table_runs_and_shows_every_row(tmp_path, monkeypatch):
    from fpn_ablate.cli.main import main

    monkeypatch.chdir(tmp_path)
    assert main(["-m", "+experiments=masks", *TINY, "recipe.roi.steps=2", "seed=2", "log.wandb=disabled", "out=results"]) == 0
    records = [json.loads(file.read_text()) for file in Path("results/runs/masks").rglob("record.json")]
    assert {r["row"]: r["status"] for r in records} == dict.fromkeys(("fpn", "c4", "mlp", "roi_pool", "boxes"), "finished")
    assert len({r["setting"] for r in records}) == 1  # they may be compared
    (table,) = Path("results/tables").glob("*.md")
    assert all(
        label in table.read_text() for label in ("FPN, masks by an MLP", "C4, RoIPool", "FPN, boxes alone", "mask AP small")
    )

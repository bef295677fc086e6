"""Boxes as wandb takes them."""

import json

import numpy as np
import pytest

from fpn_ablate.evaluation.display import MAX_PROPOSALS
from fpn_ablate.tracking.wandb_media import images_with_boxes, result_tables
from fpn_ablate.utils.paths import DETECTIONS, PICTURES, TRUTH


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "runs" / "t" / "q" / "r" / "seed0-1"
    place.mkdir(parents=True)
    kept = tmp_path / "runs" / PICTURES / "abc"
    kept.mkdir(parents=True)
    objects = [{"bbox": [10, 20, 30, 10], "category": "dog"}]
    images = {"7": {"width": 100, "height": 50, "objects": objects}, "8": {"width": 100, "height": 50, "objects": []}}
    (kept / TRUTH).write_text(json.dumps({"categories": ["cat", "dog"], "images": images}))
    return place


def find(folder, labels=None, count=1, scores=0.9):
    more = {} if labels is None else {"labels": np.full(count, labels)}
    boxes = np.tile(np.array([[-10, 25, 50, 60]], np.float32), (count, 1))
    values = np.broadcast_to(np.float32(scores), count)
    np.savez_compressed(folder / DETECTIONS, image_ids=np.full(count, 7), boxes=boxes, scores=values, **more)


def test_boxes_are_shares_of_the_picture_with_class_and_score(folder):
    find(folder, labels=1)
    (path, boxes), (_, empty) = images_with_boxes(folder, {"pictures": "abc"})
    assert path == folder.parents[3] / PICTURES / "abc" / "7.jpg" and empty == {}
    assert boxes["truth"]["box_data"] == [{"position": {"minX": 0.1, "minY": 0.4, "maxX": 0.4, "maxY": 0.6}, "class_id": 2}]
    (box,) = boxes["found"]["box_data"]
    assert box["position"] == {"minX": 0.0, "minY": 0.5, "maxX": 0.5, "maxY": 1.0}
    assert (box["class_id"], box["scores"]["score"]) == (1, pytest.approx(0.9))
    assert boxes["found"]["class_labels"] == {0: "object", 1: "cat", 2: "dog"}


def test_the_best_proposals_and_the_likely_detections(folder):
    find(folder, count=MAX_PROPOSALS + 5, scores=np.linspace(0, 0.4, MAX_PROPOSALS + 5))
    scores = [box["scores"]["score"] for box in images_with_boxes(folder, {"pictures": "abc"})[0][1]["found"]["box_data"]]
    assert len(scores) == MAX_PROPOSALS and scores == sorted(scores, reverse=True) and scores[0] == pytest.approx(0.4)
    find(folder, labels=2, count=2, scores=[0.49, 0.51])
    assert len(images_with_boxes(folder, {"pictures": "abc"})[0][1]["found"]["box_data"]) == 1


@pytest.mark.parametrize("damage", ["no record", "no detections", "rubbish"])
def test_what_is_not_there_is_not_drawn(folder, damage):
    if damage != "no detections":
        find(folder)
    if damage == "rubbish":
        (folder.parents[3] / PICTURES / "abc" / TRUTH).write_text("[1")
    assert images_with_boxes(folder, {} if damage == "no record" else {"pictures": "abc"}) == []


def test_tables_are_the_records():
    record = {"metrics": {"AP": 0.4}, "mask_per_class": {}, "per_class": {"cat": 0.3, "dog": None}}
    record["by_size"] = {"edges": [8.0, 16.0], "objects": [0, 3, 5], "AR100": [None, 0.2, 0.4]}
    assert result_tables(record) == {
        "AP by class": (["class", "AP"], [["cat", 0.3], ["dog", None]]),
        "recall by object size": (
            ["from px", "to px", "objects", "AR@100"],
            [[0.0, 8.0, 0, None], [8.0, 16.0, 3, 0.2], [16.0, None, 5, 0.4]],
        ),
    }
    assert result_tables({"status": "failed", "metrics": {}}) == {}

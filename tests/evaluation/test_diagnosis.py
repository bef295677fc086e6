"""The diagnosis: errors as TIDE's own program sorts them, curves that agree with AP and AR, crowds that do not count."""

import numpy as np
import pytest

from fpn_ablate.evaluation.coco import DetectionSet, average_precision, average_recall
from fpn_ablate.evaluation.diagnosis import ERRORS, MatchedDetections, diagnose

CATEGORIES = [{"id": 10 * k + 5, "name": str(k)} for k in range(4)]
BOUNDS = (16.0**2, 30.0**2)
# seed: what tidecv 1.0.1 says of the scene, in the order of ERRORS (errors in points of AP50, numbers).
TIDE = {
    1: ((0.194869, 0.098751, 0.016499, 0.021191, 0.023303, 0.073397), (51, 17, 23, 17, 26, 28)),
    2: ((0.128950, 0.028981, 0.011113, 0.027028, 0.022236, 0.133953), (42, 12, 19, 28, 19, 38)),
}


def scene(seed):
    """Objects of four classes in 30 images, and detections near them, far from them, and of the wrong class."""
    r = np.random.default_rng(seed)
    images = [{"id": i + 1, "width": 100, "height": 100} for i in range(30)]
    annotations, found = [], []
    for image in images:
        for _ in range(r.integers(0, 8)):
            (w, h), (x, y) = r.uniform(8, 40, 2), r.uniform(0, 60, 2)
            k = int(r.integers(4))
            box = {"bbox": [float(side) for side in (x, y, w, h)], "area": w * h, "category_id": CATEGORIES[k]["id"]}
            annotations.append(box | {"id": len(annotations) + 1, "image_id": image["id"], "iscrowd": 0})
            for _ in range(r.integers(0, 4)):
                j = r.normal(0, r.choice([1, 4, 12]), 4)
                label = k + 1 if r.random() < 0.8 else r.integers(1, 5)
                found.append((image["id"], x + j[0], y + j[1], x + w + j[2], y + h + j[3], r.random(), label))
        for _ in range(r.integers(0, 4)):
            (x, y), (w, h) = r.uniform(0, 60, 2), r.uniform(8, 40, 2)
            found.append((image["id"], x, y, x + w, y + h, r.random(), r.integers(1, 5)))
    a = np.array(found)
    a = a[(a[:, 3] > a[:, 1]) & (a[:, 4] > a[:, 2])]
    ids, labels = a[:, 0].astype(int), a[:, 6].astype(int)
    return {"images": images, "annotations": annotations}, DetectionSet(
        ids, a[:, 1:5].astype(np.float32), a[:, 5].astype(np.float32), labels
    )


@pytest.mark.parametrize("seed", TIDE)
def test_errors_are_those_of_tides_own_program(seed):
    truth, detections = scene(seed)
    made = diagnose(truth, detections, CATEGORIES, BOUNDS)
    np.testing.assert_allclose(made["errors"], TIDE[seed][0], atol=2e-6)
    assert made["error_counts"].tolist() == list(TIDE[seed][1])


def test_curves_agree_with_precision_and_recall_and_every_detection_is_in_a_bin():
    truth, detections = scene(1)
    made = diagnose(truth, detections, CATEGORIES, BOUNDS)
    precision, _ = average_precision(truth, detections, CATEGORIES, BOUNDS)
    assert made["precision"].mean(1) == pytest.approx([precision[name] for name in ("AP50", "AP75", "AP")], abs=1e-6)
    recall = average_recall(truth, detections, BOUNDS)
    assert made["recall_by_iou"].mean(1) == pytest.approx([recall[f"AR100{end}"] for end in ("", "_s", "_m", "_l")])
    assert made["calibration"][:, 0].sum() == len(detections.scores)
    assert made["calibration"][:, 2].sum() == pytest.approx(detections.scores.sum(), rel=1e-5)


def test_each_kind_of_error_by_hand():
    truth = {"images": [{"id": 1, "width": 99, "height": 99}, {"id": 2, "width": 99, "height": 99}]}
    objects = [(0, 0, 20, 20, 5), (40, 0, 20, 20, 5), (0, 40, 20, 20, 15), (40, 40, 20, 20, 5), (70, 70, 20, 20, 5)]
    truth["annotations"] = [{"image_id": 1, "bbox": list(box), "category_id": c, "iscrowd": 0} for *box, c in objects]
    truth["annotations"][-1]["iscrowd"] = 1
    boxes = {
        (0, 0, 20, 20): 1,  # correct
        (1, 0, 21, 20): 1,  # duplicate
        (48, 0, 68, 20): 1,  # localisation
        (0, 40, 20, 60.5): 1,  # class
        (8, 40, 28, 60): 1,  # class and localisation
        (20, 80, 40, 99): 2,  # background
        (71, 71, 89, 89): 1,  # in a crowd: no error
    }
    scores = np.linspace(0.9, 0.3, len(boxes), dtype=np.float32)
    detections = DetectionSet(
        np.ones(len(boxes), int), np.array(list(boxes), np.float32), scores, np.array(list(boxes.values()))
    )
    images = MatchedDetections(truth, detections, CATEGORIES)
    assert dict(zip(ERRORS, images.counts().tolist(), strict=True)) == {
        **{"localisation": 1, "class": 1, "duplicate": 1, "background": 1, "class and localisation": 1},
        "missed": 1,
    }
    assert images.missed.tolist() == [0, 1, 0, 0, 0] and len(images.kinds) == len(boxes) - 1


def test_proposals_count_as_one_class_and_no_object_leaves_nothing_defined():
    truth, detections = scene(2)
    proposals = DetectionSet(detections.image_ids, detections.boxes, detections.scores)
    made = diagnose(truth, proposals, CATEGORIES, BOUNDS)
    assert made["error_counts"][1] == made["error_counts"][4] == 0
    empty = diagnose({**truth, "annotations": []}, detections, CATEGORIES, BOUNDS)
    assert np.isnan(empty["errors"]).all() and np.isnan(empty["precision"]).all() and np.isnan(empty["recall_by_iou"]).all()
    assert empty["error_counts"].tolist() == [0, 0, 0, len(detections.scores), 0, 0]

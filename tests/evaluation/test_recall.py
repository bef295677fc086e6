"""Our own recall against pycocotools' where it is easiest to be wrong: ties everywhere, crowds, sizes, ids in any order."""

import numpy as np
import pytest
from coco_sets import annotation

from fpn_ablate.evaluation import recall
from fpn_ablate.evaluation.coco import DetectionSet, average_recall

LIMITS = (1, 5, 20)
BOUNDS = (4.0**2, 8.0**2)
RANGES = [(0, 1e10), (0, BOUNDS[0]), BOUNDS, (BOUNDS[1], 1e10)]


def crowded(seed, images=9):
    """Boxes on a coarse grid, so that overlaps, scores and sizes tie; objects that coincide; images without anything."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(100)[:images].tolist()
    annotations, found = [], []
    for n, image in enumerate(ids):
        for _ in range(int(rng.integers(0, 9)) if n else 0):
            x, y, w, h = (*rng.integers(0, 8, 2), *(2 * rng.integers(1, 6, 2)))
            area = float(w * h) if rng.random() < 0.7 else float(rng.choice([16, 64]))
            box = [float(v) for v in (x, y, w, h)]
            annotations.append(annotation(len(annotations) + 1, image, box, area, rng.random() < 0.25))
        for _ in range(int(rng.integers(0, 40)) if n != 1 else 0):
            x, y, w, h = (*rng.integers(0, 8, 2), *(2 * rng.integers(1, 6, 2)))
            found.append((image, x, y, x + w, y + h, rng.integers(0, 4) / 4))
    table = np.array(found)[rng.permutation(len(found))]
    truth = {
        "images": [{"id": i, "width": 20, "height": 20} for i in ids],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "x"}],
    }
    return truth, DetectionSet(table[:, 0].astype(np.int64), table[:, 1:5].astype(np.float32), table[:, 5].astype(np.float32))


def matches_of(truth, detections, limits=LIMITS, ranges=RANGES):
    return recall.match_boxes(truth, detections.image_ids, detections.boxes, detections.scores, ranges, limits)


@pytest.mark.parametrize("seed", range(20))
def test_where_everything_ties_it_is_pycocotools(seed):
    truth, detections = crowded(seed)
    expected = average_recall(truth, detections, BOUNDS, LIMITS, "pycocotools")
    metrics = average_recall(truth, detections, BOUNDS, LIMITS)
    assert metrics == {name: value if value is None else pytest.approx(value, abs=1e-12) for name, value in expected.items()}


def test_how_many_images_are_in_memory_does_not_matter(monkeypatch):
    scene = crowded(3)
    whole = matches_of(*scene)
    monkeypatch.setattr(recall, "IMAGES_AT_ONCE", 2)
    parts = matches_of(*scene)
    assert whole.matched.sum() > 0
    for name in ("ids", "matched", "objects"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))


def test_each_images_hits_are_those_of_the_image_alone():
    truth, detections = crowded(5)
    together = matches_of(truth, detections)
    assert together.ids.tolist() == sorted(image["id"] for image in truth["images"])
    for n, key in enumerate(together.ids.tolist()):
        single = {**truth, "images": [{"id": key}], "annotations": [a for a in truth["annotations"] if a["image_id"] == key]}
        alone = matches_of(single, detections)  # with the boxes of images that are not declared
        np.testing.assert_array_equal(alone.matched[0], together.matched[n])
        np.testing.assert_array_equal(alone.objects[0], together.objects[n])


def test_many_ranges_and_limits_at_once_are_each_of_them_alone():
    truth, detections = crowded(8)
    ranges = [(float(low), float(low + 40)) for low in range(0, 120, 10)]
    together = matches_of(truth, detections, range(1, 12), ranges)
    for a, area in enumerate(ranges):
        for m, limit in enumerate(range(1, 12)):
            np.testing.assert_array_equal(
                matches_of(truth, detections, [limit], [area]).matched[:, 0, 0], together.matched[:, m, a]
            )


def test_nothing_declared_and_nothing_found():
    empty = DetectionSet(np.zeros(0, np.int64), np.zeros((0, 4), np.float32), np.zeros(0, np.float32))
    assert np.isnan(matches_of({"images": [], "annotations": []}, empty).recall()).all()
    truth, _ = crowded(0)
    assert (matches_of(truth, empty).recall() == 0).all()

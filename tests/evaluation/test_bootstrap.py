"""The bootstrap over images, against evaluations of data sets in which the drawn images really stand several times."""

import numpy as np
import pytest
from coco_sets import annotation

from fpn_ablate.evaluation import bootstrap
from fpn_ablate.evaluation.bootstrap import REPLICATES, bootstrap_indices, bootstrap_metrics, per_image_metrics
from fpn_ablate.evaluation.coco import DetectionSet, average_precision, average_recall

CATEGORIES = [{"id": 3, "name": "a"}, {"id": 7, "name": "b"}]
BOUNDS = (20.0**2, 40.0**2)


@pytest.fixture
def world():
    """12 images (one without objects, one with nothing but a crowd), ids in no order; detections near objects and elsewhere."""
    generator = np.random.default_rng(3)
    ids = generator.permutation(np.arange(5, 17)).tolist()
    images = [{"id": i, "width": 100, "height": 100} for i in ids]
    annotations, found = [], []
    for i in ids:
        for k in range(0 if i == ids[0] else 1 if i == ids[1] else generator.integers(1, 6)):
            size, corner = generator.uniform(8, 60), generator.uniform(0, 40, 2)
            label = int(generator.integers(2))
            box = [*corner.tolist(), float(size), float(size)]
            number, category = len(annotations) + 1, CATEGORIES[label]["id"]
            annotations.append(annotation(number, i, box, float(size**2), i == ids[1], category))
            for _ in range(3):
                shift = generator.normal(0, 2 + 3 * k, 4)
                found.append((i, np.array([box[0], box[1], box[0] + size, box[1] + size]) + shift, label + 1))
        found.append((i, np.array([50.0, 50, 90, 90]), 1))
    scores = generator.permutation(np.linspace(0.1, 0.9, len(found)))  # no ties, which a copy of an image would have to break
    detections = DetectionSet(
        np.array([f[0] for f in found]), np.stack([f[1] for f in found]).astype(np.float32), scores.astype(np.float32),
        np.array([f[2] for f in found]),
    )  # fmt: skip
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}, detections


def copied(truth, detections, drawn):
    """The data set of the drawn images, each copy with an id of its own; copies next to each other, as in the order of ids."""
    ids = np.sort([image["id"] for image in truth["images"]])[np.sort(drawn)]
    images = [{"id": n, "width": 100, "height": 100} for n in range(len(ids))]
    annotations = [
        a | {"image_id": n, "id": 1000 * n + a["id"]}
        for n, i in enumerate(ids)
        for a in truth["annotations"]
        if a["image_id"] == i
    ]
    rows = [(n, k) for n, i in enumerate(ids) for k in np.flatnonzero(detections.image_ids == i)]
    taken = [k for _, k in rows]
    labels = None if detections.labels is None else detections.labels[taken]
    copies = DetectionSet(np.array([n for n, _ in rows]), detections.boxes[taken], detections.scores[taken], labels)
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}, copies


@pytest.mark.parametrize("labels", [True, False])
def test_a_replicate_is_the_evaluation_of_the_drawn_images(world, labels):
    truth, detections = world
    if not labels:
        detections = DetectionSet(detections.image_ids, detections.boxes, detections.scores)
    drawn = bootstrap_indices(len(truth["images"]), np.random.default_rng(1), 25)
    found = bootstrap_metrics(truth, detections, CATEGORIES, BOUNDS, drawn)
    expected_names = {"AP", "AP50", "AP75", "AP_s", "AP_m", "AP_l"} if labels else {"AR1k", "AR1k_s", "AR1k_m", "AR1k_l"}
    assert set(found) == expected_names | {"AR100", "AR100_s", "AR100_m", "AR100_l"}
    for b, row in enumerate(drawn):
        again = copied(truth, detections, row)
        expected = average_recall(*again, BOUNDS)
        if labels:
            expected |= average_precision(*again, CATEGORIES, BOUNDS)[0]
        for name, values in found.items():
            if expected[name] is None:
                assert np.isnan(values[b])
            else:
                assert values[b] == pytest.approx(expected[name], abs=1e-12), name


def test_every_image_once_is_the_metric_itself(world):
    truth, detections = world
    drawn = np.random.default_rng(0).permuted(np.arange(12))[None]
    found = bootstrap_metrics(truth, detections, CATEGORIES, BOUNDS, drawn)
    for name, value in average_precision(truth, detections, CATEGORIES, BOUNDS)[0].items():
        assert found[name][0] == pytest.approx(value, abs=1e-12)


def test_the_same_generator_gives_the_same_draws(monkeypatch):
    monkeypatch.setattr(bootstrap, "REPLICATES", REPLICATES)  # of a user's process; shared_fixtures.py draws fewer
    first, second = (bootstrap_indices(50, np.random.default_rng(9), 7) for _ in range(2))
    assert (first == second).all() and first.shape == (7, 50)
    assert (first != bootstrap_indices(50, np.random.default_rng(10), 7)).any()
    assert [len(bootstrap_indices(images, np.random.default_rng(0))) for images in (1000, 1001)] == [400, 100]


@pytest.mark.parametrize("labels", [True, False])
def test_an_image_alone(world, labels):
    truth, detections = world
    if not labels:
        detections = DetectionSet(detections.image_ids, detections.boxes, detections.scores)
    ids, values = per_image_metrics(truth, detections, CATEGORIES)
    assert ids.tolist() == sorted(image["id"] for image in truth["images"])
    for n, value in enumerate(values):
        again = copied(truth, detections, np.array([n]))
        alone = average_precision(*again, CATEGORIES)[0]["AP"] if labels else average_recall(*again)["AR100"]
        assert np.isnan(value) if alone is None else value == pytest.approx(alone)
    assert np.isnan(values).sum() == 2

"""AP and AR of masks: COCO's evaluators and our own matching agree, on generated masks and on COCO's own example."""

import json
from dataclasses import replace

import numpy as np
import pytest
from coco_sets import CATEGORIES, REAL

from fpn_ablate.evaluation.bootstrap import bootstrap_metrics, per_image_metrics
from fpn_ablate.evaluation.coco import DetectionSet, average_precision, average_recall, mask_name
from fpn_ablate.utils import rle

BOUNDS = 8.0**2, 14.0**2
SIZES = {5: (40, 60), 3: (50, 50), 8: (64, 32), 9: (30, 30)}
EXACT = {"abs": 1e-9, "nan_ok": True}


def blob(rng, size, box=None):
    """An ellipse with a bite, in a random box or near `box`."""
    height, width = size
    if box is None:
        box = *rng.uniform(0, 0.7, 2) * (width, height), *rng.uniform(0.1, 0.5, 2) * (width, height)
    x0, y0, w, h = box
    y, x = np.mgrid[:height, :width] + 0.5
    u, v = (x - x0 - w / 2) / (w / 2), (y - y0 - h / 2) / (h / 2)
    return (u**2 + v**2 < 1) & ~((u > 0) & (v > 0.3)), np.array(box)


@pytest.fixture(scope="module")
def scene():
    """Objects, one of them a crowd region, and detections around them and elsewhere; the image 9 has nothing."""
    rng = np.random.default_rng(0)
    annotations, rows = [], []
    for key in (5, 3, 8):
        for n in range(5):
            mask, box = blob(rng, SIZES[key])
            (counts,) = rle.encode(mask[None])
            label = int(rng.integers(3))
            entry = {"id": len(annotations) + 1, "image_id": key, "category_id": CATEGORIES[label]["id"], "bbox": box.tolist()}
            entry |= {"area": float(mask.sum()), "iscrowd": int(n == 4), "segmentation": rle.coco_object(counts, SIZES[key])}
            annotations.append(entry)
            rows += [(key, label + 1, *blob(rng, SIZES[key], box * rng.uniform(0.9, 1.1, 4))) for _ in range(3)]
        rows += [(key, int(rng.integers(3)) + 1, *blob(rng, SIZES[key])) for _ in range(4)]
    images = [{"id": key, "height": h, "width": w} for key, (h, w) in SIZES.items()]
    truth = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    ids, labels, masks, boxes = zip(*rows, strict=True)
    boxes = np.array(boxes, np.float32)
    boxes[:, 2:] += boxes[:, :2]
    scores = rng.random(len(rows)).astype(np.float32).round(1)
    counts = [rle.encode(mask[None])[0] for mask in masks]
    return truth, DetectionSet(np.array(ids), boxes, scores, np.array(labels), counts)


def test_precision_of_masks_is_that_of_pycocotools(scene):
    truth, detections = scene
    ours, reference = (
        average_precision(truth, detections, CATEGORIES, BOUNDS, engine=engine, by="segm")
        for engine in ("faster-coco-eval", "pycocotools")
    )
    assert all(a == pytest.approx(b, **EXACT) for a, b in zip(ours, reference, strict=True))
    assert 0.1 < ours[0]["AP"] < 0.9 and ours != average_precision(truth, detections, CATEGORIES, BOUNDS)


@pytest.mark.parametrize("engine", ["faster-coco-eval", "pycocotools"])
def test_recall_of_proposals_with_masks_is_that_of_coco(scene, engine):
    truth, detections = scene
    proposals = replace(detections, labels=None)
    ours = average_recall(truth, proposals, BOUNDS, limits=(1, 3, 100))
    assert ours == pytest.approx(average_recall(truth, proposals, BOUNDS, (1, 3, 100), engine), **EXACT)
    assert ours != average_recall(truth, replace(proposals, masks=None), BOUNDS, limits=(1, 3, 100))
    # Recall of labelled detections stays that of their boxes.
    assert average_recall(truth, detections, BOUNDS) == average_recall(truth, replace(detections, masks=None), BOUNDS)


def test_a_replicate_of_all_images_has_the_metrics_of_the_set(scene):
    truth, detections = scene
    whole = np.arange(len(SIZES))[None]
    values = bootstrap_metrics(truth, detections, CATEGORIES, BOUNDS, whole)
    plain = bootstrap_metrics(truth, replace(detections, masks=None), CATEGORIES, BOUNDS, whole)
    masks = {mask_name(k): v for k, v in average_precision(truth, detections, CATEGORIES, BOUNDS, by="segm")[0].items()}
    assert {name: value.item() for name, value in values.items()} == pytest.approx(
        {**{name: value.item() for name, value in plain.items()}, **masks}, **EXACT
    )
    proposals = replace(detections, labels=None)
    recall = bootstrap_metrics(truth, proposals, CATEGORIES, BOUNDS, whole)
    assert {name: value.item() for name, value in recall.items()} == pytest.approx(
        average_recall(truth, proposals, BOUNDS), **EXACT
    )


def test_each_image_alone_has_the_recall_of_its_masks(scene):
    truth, detections = scene
    proposals = replace(detections, labels=None)
    ids, values = per_image_metrics(truth, proposals, CATEGORIES)
    for key, value in zip(ids.tolist(), values.tolist(), strict=True):
        alone = {**truth, "images": [i for i in truth["images"] if i["id"] == key]}
        alone["annotations"] = [a for a in truth["annotations"] if a["image_id"] == key]
        expected = average_recall(alone, proposals)["AR100"]
        assert value == pytest.approx(np.nan if expected is None else expected, abs=1e-6, nan_ok=True)


def test_masks_are_saved_and_loaded(scene, tmp_path):
    _, detections = scene
    detections.save(tmp_path / "detections.npz")
    loaded = DetectionSet.load(tmp_path / "detections.npz")
    assert loaded.masks == detections.masks and np.array_equal(loaded.labels, detections.labels)
    empty = DetectionSet(np.zeros(0, np.int64), np.zeros((0, 4), np.float32), np.zeros(0, np.float32), None, [])
    empty.save(tmp_path / "empty.npz")
    assert DetectionSet.load(tmp_path / "empty.npz").masks == []


def test_results_of_masks_are_what_cocos_api_evaluates_alone(scene, tmp_path):
    """A file of results, read by COCO's own API, gives the same AP by size: its areas are those of masks."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, detections = scene
    file = tmp_path / "results.json"
    file.write_text(json.dumps(detections.coco_results(CATEGORIES, SIZES)))
    coco = COCO()
    coco.dataset = truth
    coco.createIndex()
    evaluation = COCOeval(coco, coco.loadRes(str(file)), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    ours, _ = average_precision(truth, detections, CATEGORIES, by="segm")
    assert [ours[name] for name in ("AP", "AP50", "AP75", "AP_s")] == pytest.approx(evaluation.stats[:4].tolist(), abs=1e-9)


def test_more_masks_than_a_byte_counts_have_their_areas(scene):
    _, detections = scene
    counts = [detections.masks[0]] * 300
    assert rle.areas(counts, SIZES[5]).tolist() == [rle.decode(counts[:1], SIZES[5]).sum()] * 300
    assert rle.boxes(counts, np.array([SIZES[5]] * 300)).shape == (300, 4)


@pytest.mark.skipif(not (REAL / "coco_eval").is_dir(), reason="needs real data")
@pytest.mark.parametrize("engine", ["faster-coco-eval", "pycocotools"])
def test_cocos_own_example_has_its_published_figures(engine):
    folder = REAL / "coco_eval"
    names = ("instances_val2014_100", "instances_val2014_fakesegm100_results", "expected_segm")
    truth, results, expected = (json.loads((folder / f"{name}.json").read_text()) for name in names)
    categories = sorted(truth["categories"], key=lambda category: category["id"])
    labels = {category["id"]: label for label, category in enumerate(categories, start=1)}
    columns = [[entry[key] for entry in results] for key in ("image_id", "score", "category_id", "segmentation")]
    ids, scores, kinds, masks = columns
    detections = DetectionSet(
        np.array(ids),
        np.zeros((len(ids), 4), np.float32),
        np.array(scores),
        np.array([labels[kind] for kind in kinds]),
        [mask["counts"].encode() for mask in masks],
    )
    figures = dict(zip(expected["order"], expected["pycocotools_full_precision"], strict=True))
    precision, _ = average_precision(truth, detections, categories, engine=engine, by="segm")
    assert {name.replace("_", ""): value for name, value in precision.items()} == pytest.approx(
        {name: figures[name] for name in figures if name.startswith("AP")}, abs=1e-9
    )
    proposals = replace(detections, labels=None)
    assert average_recall(truth, proposals) == pytest.approx(average_recall(truth, proposals, engine=engine), abs=1e-9)

"""Average recall: the fast evaluator against pycocotools, and both against published figures."""

import contextlib
import io
import json

import numpy as np
import pytest
from coco_sets import REAL

from fpn_ablate.metrics import Detections, average_recall, evaluator_name

ENGINES = ("faster-coco-eval", "pycocotools")
BOUNDS = (32.0**2, 96.0**2)


def scene(seed=0, images=12, crowds=True, tied=False, first_id=0):
    """Objects of all sizes, some of them crowd regions; proposals around them and elsewhere, more than 100 on one image."""
    rng = np.random.default_rng(seed)
    truth = {"images": [], "annotations": [], "categories": [{"id": k, "name": str(k)} for k in (3, 8)]}
    found = []
    for image_id in range(5, 5 + images):
        truth["images"].append({"id": image_id, "height": 300, "width": 400})
        for _ in range(int(rng.integers(0, 7))):
            side = float(np.exp(rng.uniform(np.log(6), np.log(200))))
            x, y = rng.uniform(0, 400 - side), rng.uniform(0, 300 - min(side, 299))
            truth["annotations"].append(
                {
                    "id": first_id + len(truth["annotations"]),
                    "image_id": image_id,
                    "category_id": int(rng.choice([3, 8])),
                    "bbox": [x, y, side, side * 0.9],
                    "area": side * side * float(rng.uniform(0.5, 0.9)),
                    "iscrowd": int(crowds and rng.random() < 0.2),
                }
            )
            for _ in range(3):
                shift = rng.uniform(-0.2, 0.2, 4) * side
                box = np.array([x, y, x + side, y + side * 0.9]) + shift
                found.append((image_id, *box, rng.random()))
        found += [
            (image_id, *rng.uniform(0, 100, 2), *rng.uniform(110, 300, 2), rng.random())
            for _ in range(60 if image_id > 5 else 150)
        ]
    table = np.array(found)
    if tied:
        table[:, 5] = np.round(table[:, 5], 1)
    table = table[np.argsort(-table[:, 5], kind="stable")]
    return truth, Detections(table[:, 0].astype(np.int64), table[:, 1:5].astype(np.float32), table[:, 5].astype(np.float32))


def nothing():
    return Detections(np.zeros(0, np.int64), np.zeros((0, 4), np.float32), np.zeros(0, np.float32))


def both(truth, detections, bounds=BOUNDS, limits=(100, 1000)):
    ours, reference = (average_recall(truth, detections, bounds, limits, engine) for engine in ENGINES)
    assert ours.keys() == reference.keys()
    for name, value in ours.items():
        assert (value is None) == (reference[name] is None), name
        assert value is None or value == pytest.approx(reference[name], abs=1e-9), name
    return ours


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("crowds", [False, True])
def test_the_fast_evaluator_gives_pycocotools_figures(seed, tied, crowds):
    found = both(*scene(seed, tied=tied, crowds=crowds))
    assert set(found) == {f"{ar}{size}" for ar in ("AR100", "AR1k") for size in ("", "_s", "_m", "_l")}
    assert all(0 < value <= 1 for value in found.values())
    assert found["AR1k"] >= found["AR100"]


def slow_recall(truth, detections, limit, low, high):
    """Greedy matching by score for each IoU threshold, written out; crowds and other sizes neither help nor hurt."""
    recalls = []
    for threshold in np.arange(0.5, 0.96, 0.05):
        hit = total = 0
        for image in truth["images"]:
            own = detections.image_ids == image["id"]
            order = np.argsort(-detections.scores[own], kind="stable")[:limit]
            boxes = detections.boxes[own][order].astype(float)
            gt = [a for a in truth["annotations"] if a["image_id"] == image["id"]]
            ignored = [bool(a["iscrowd"]) or not low <= a["area"] <= high for a in gt]
            total += len(gt) - sum(ignored)
            taken = set()
            for box in boxes:
                best, match = threshold - 1e-10, None
                for wanted_ignored in (False, True):
                    for g, a in enumerate(gt):
                        if ignored[g] != wanted_ignored or (g in taken and not a["iscrowd"]):
                            continue
                        x, y, w, h = a["bbox"]
                        shared = max(0, min(x + w, box[2]) - max(x, box[0])) * max(0, min(y + h, box[3]) - max(y, box[1]))
                        size = (box[2] - box[0]) * (box[3] - box[1])
                        iou = shared / (size if a["iscrowd"] else size + w * h - shared)
                        if iou >= best:
                            best, match = iou, g
                    if match is not None:
                        break
                if match is not None:
                    taken.add(match)
                    hit += not ignored[match]
        recalls.append(hit / total)
    return float(np.mean(recalls))


def test_recall_by_the_definition():
    truth, detections = scene(1, images=6)
    found = average_recall(truth, detections, limits=(10, 100))
    for suffix, low, high in (("", 0, 1e10), ("_s", 0, BOUNDS[0]), ("_m", *BOUNDS), ("_l", BOUNDS[1], 1e10)):
        assert found[f"AR10{suffix}"] == pytest.approx(slow_recall(truth, detections, 10, low, high)), suffix
    assert found["AR10"] < found["AR100"]


def test_without_proposals_recall_is_0():
    found = both(scene()[0], nothing())
    assert set(found.values()) == {0.0}


def test_without_objects_recall_is_undefined():
    truth, detections = scene()
    assert set(both({**truth, "annotations": []}, detections).values()) == {None}
    only_crowds = [{**a, "iscrowd": 1} for a in truth["annotations"]]
    assert set(both({**truth, "annotations": only_crowds}, detections).values()) == {None}


def test_a_size_without_objects_is_undefined_alone():
    truth, detections = scene()
    truth["annotations"] = [a for a in truth["annotations"] if a["area"] > BOUNDS[0]]
    found = both(truth, detections)
    assert {name for name, value in found.items() if value is None} == {"AR100_s", "AR1k_s"}


def perfect(*sides, score=0.9, first_id=1, crowd=0):
    """One image with a square object of each side, each found exactly."""
    corners = np.cumsum([0, *sides[:-1]]) + 10.0 * np.arange(len(sides))
    truth = {
        "images": [{"id": 1, "height": 2000, "width": 2000}],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [
            {
                "id": first_id + i,
                "image_id": 1,
                "category_id": 1,
                "bbox": [float(c), 0.0, s, s],
                "area": s * s,
                "iscrowd": crowd,
            }
            for i, (c, s) in enumerate(zip(corners.tolist(), sides, strict=True))
        ],
    }
    boxes = np.array([[c, 0, c + s, s] for c, s in zip(corners, sides, strict=True)], np.float32)
    return truth, Detections(np.ones(len(sides), np.int64), boxes, np.full(len(sides), score, np.float32))


@pytest.mark.parametrize(("side", "sizes"), [(10, "s"), (16, "sm"), (17, "m"), (48, "ml"), (50, "l")])
def test_the_bounds_of_the_sizes_are_the_callers(side, sizes):
    """An object exactly on a bound counts on both sides, as in COCO."""
    found = both(*perfect(side), bounds=(16.0**2, 48.0**2))
    assert {name[-1] for name, value in found.items() if name.startswith("AR1k_") and value == 1} == set(sizes)


def test_annotation_id_0_is_an_object_like_any_other():
    assert both(*perfect(20, 50, first_id=0))["AR100"] == 1


def test_the_category_does_not_matter():
    truth, detections = perfect(20, 50)
    truth["categories"].append({"id": 7, "name": "other"})
    truth["annotations"][1]["category_id"] = 7
    assert both(truth, detections)["AR100"] == 1


def test_the_limit_counts_an_images_best_proposals():
    truth, detections = perfect(*[20] * 12)
    scores = np.linspace(0.9, 0.1, 12).astype(np.float32)
    found = both(truth, Detections(detections.image_ids, detections.boxes, scores), limits=(3, 1000))
    assert found["AR3"] == pytest.approx(3 / 12)
    assert found["AR1k"] == 1


def test_images_without_proposals_count():
    truth, detections = scene()
    truth["images"].append({"id": 99, "height": 10, "width": 10})
    truth["annotations"].append({"id": 999, "image_id": 99, "category_id": 3, "bbox": [0, 0, 5, 5], "area": 25, "iscrowd": 0})
    before, after = average_recall(*scene()), average_recall(truth, detections)
    assert after["AR1k_s"] < before["AR1k_s"]
    assert after["AR1k_l"] == before["AR1k_l"]


def test_the_truth_is_left_as_it_was():
    truth, detections = scene()
    copy = json.loads(json.dumps(truth))
    average_recall(truth, detections)
    assert truth == copy


def test_detections_come_back_from_their_file(tmp_path):
    detections = scene()[1]
    detections.save(tmp_path / "d.npz")
    loaded = Detections.load(tmp_path / "d.npz")
    for name in ("image_ids", "boxes", "scores"):
        assert np.array_equal(getattr(loaded, name), getattr(detections, name))
        assert getattr(loaded, name).dtype == getattr(detections, name).dtype


def test_the_evaluators_name_has_its_version():
    name, version = evaluator_name().split(" ")
    assert name == "faster-coco-eval"
    assert version[0].isdigit()


FILES = [
    ("instances_val2014_100.json", "instances_val2014_fakebbox100_results.json"),
    ("padilla_gts_nocrowd_bboxarea.json", "padilla_dets.json"),
    ("voc100_gt.json", "voc100_dets.json"),
]


@pytest.mark.parametrize(("truth_file", "detections_file"), FILES)
def test_real_sets_give_the_same_through_pycocotools_own_loader(truth_file, detections_file):
    """An independent evaluation: the file itself, `loadRes`, and AR at 100 from the standard limits."""
    folder = REAL / "coco_eval"
    if not folder.is_dir():
        pytest.skip(f"no evaluator references at {folder}")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, results = (json.loads((folder / name).read_text()) for name in (truth_file, detections_file))
    boxes = np.array([d["bbox"] for d in results], np.float64)
    boxes[:, 2:] += boxes[:, :2]
    detections = Detections(
        np.array([d["image_id"] for d in results]), boxes, np.array([d["score"] for d in results])
    )  # in double precision, as the file has them
    found = both(truth, detections)

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(folder / truth_file)
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.params.useCats = 0
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    expected = evaluation.stats[8:12]
    for name, value in zip(("AR100", "AR100_s", "AR100_m", "AR100_l"), expected, strict=True):
        assert found[name] == pytest.approx(value, abs=1e-9) if value > -1 else found[name] is None, name

"""Average recall and precision: the fast evaluator against pycocotools, and both against written-out definitions."""

import contextlib
import io
import json
from dataclasses import replace

import numpy as np
import pytest
from coco_sets import REAL, annotation

from fpn_ablate.evaluation.coco import DetectionSet, average_precision, average_recall, evaluator_name

ENGINES = (None, "faster-coco-eval", "pycocotools")
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
            category, area = int(rng.choice([3, 8])), side * side * float(rng.uniform(0.5, 0.9))
            crowd, number = crowds and rng.random() < 0.2, first_id + len(truth["annotations"])
            truth["annotations"].append(annotation(number, image_id, [x, y, side, side * 0.9], area, crowd, category))
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
    return truth, DetectionSet(table[:, 0].astype(np.int64), table[:, 1:5].astype(np.float32), table[:, 5].astype(np.float32))


def nothing():
    return DetectionSet(np.zeros(0, np.int64), np.zeros((0, 4), np.float32), np.zeros(0, np.float32))


def both(truth, detections, bounds=BOUNDS, limits=(100, 1000)):
    ours, *references = (average_recall(truth, detections, bounds, limits, engine) for engine in ENGINES)
    for reference in references:
        assert ours == {name: value if value is None else pytest.approx(value, abs=1e-9) for name, value in reference.items()}
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


def test_without_objects_recall_and_precision_are_undefined():
    truth, detections = labelled()
    assert set(both({**truth, "annotations": []}, detections).values()) == {None}
    metrics, per_class = both_ap({**truth, "annotations": []}, detections)
    assert set(metrics.values()) == set(per_class.values()) == {None}
    only_crowds = [{**a, "iscrowd": 1} for a in truth["annotations"]]
    assert set(both({**truth, "annotations": only_crowds}, detections).values()) == {None}


def test_a_size_without_objects_is_undefined_alone():
    truth, detections = scene()
    truth["annotations"] = [a for a in truth["annotations"] if a["area"] > BOUNDS[0]]
    found = both(truth, detections)
    assert {name for name, value in found.items() if value is None} == {"AR100_s", "AR1k_s"}


def perfect(*sides, first_id=1):
    """One image with a square object of each side, each found exactly."""
    corners = np.cumsum([0, *sides[:-1]]) + 10.0 * np.arange(len(sides))
    truth = {
        "images": [{"id": 1, "height": 2000, "width": 2000}],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [
            annotation(first_id + i, 1, [float(c), 0.0, s, s], s * s)
            for i, (c, s) in enumerate(zip(corners.tolist(), sides, strict=True))
        ],
    }
    boxes = np.array([[c, 0, c + s, s] for c, s in zip(corners, sides, strict=True)], np.float32)
    return truth, DetectionSet(np.ones(len(sides), np.int64), boxes, np.full(len(sides), 0.9, np.float32))


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
    found = both(truth, DetectionSet(detections.image_ids, detections.boxes, scores), limits=(3, 1000))
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
    truth, detections = labelled()
    copy = json.loads(json.dumps(truth))
    average_recall(truth, detections)
    average_precision(truth, detections, CATEGORIES)
    assert truth == copy and CATEGORIES[0] == {"id": 90, "name": "bee"}


def test_detections_come_back_from_their_file(tmp_path):
    detections = scene()[1]
    detections.save(tmp_path / "d.npz")
    loaded = DetectionSet.load(tmp_path / "d.npz")
    assert loaded.labels is None
    for name in ("image_ids", "boxes", "scores"):
        assert np.array_equal(getattr(loaded, name), getattr(detections, name))
        assert getattr(loaded, name).dtype == getattr(detections, name).dtype
    labelled()[1].save(tmp_path / "labelled.npz")
    assert np.array_equal(DetectionSet.load(tmp_path / "labelled.npz").labels, labelled()[1].labels)


def test_the_evaluators_name_has_its_version():
    *_, name, version = evaluator_name().split(" ")
    assert name == "faster-coco-eval"
    assert version[0].isdigit()


FILES = [
    ("instances_val2014_100.json", "instances_val2014_fakebbox100_results.json"),
    ("padilla_gts_nocrowd_bboxarea.json", "padilla_dets.json"),
    ("voc100_gt.json", "voc100_dets.json"),
]


def real(truth_file, detections_file):
    """(truth, results list) of files that others have made."""
    folder = REAL / "coco_eval"
    if not folder.is_dir():
        pytest.skip(f"no evaluator references at {folder}")
    return tuple(json.loads((folder / name).read_text()) for name in (truth_file, detections_file))


def as_detections(truth, results):
    """In double precision, as a file has them."""
    label = {c["id"]: k for k, c in enumerate(truth["categories"], start=1)}
    boxes = np.array([d["bbox"] for d in results], np.float64)
    boxes[:, 2:] += boxes[:, :2]
    ids, scores = (np.array([d[key] for d in results]) for key in ("image_id", "score"))
    return DetectionSet(ids, boxes, scores, np.array([label[d["category_id"]] for d in results]))


@pytest.mark.parametrize(("each", "files"), [*((1, files) for files in FILES), (4, FILES[0])])
def test_real_sets_give_the_same_through_pycocotools_own_loader(files, each):
    """An independent evaluation: the truth's file itself, `loadRes`, all categories as one. A detector's boxes are few: four of
    each, moved a little, are more than a hundred on an image, so that the limit decides."""
    truth, results = real(*files)
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    rng = np.random.default_rng(0)
    results += [
        {**d, "bbox": (np.array(d["bbox"]) * rng.uniform(0.9, 1.1, 4)).tolist(), "score": d["score"] * rng.random()}
        for _ in range(1, each)
        for d in results[:]
    ]
    found = both(truth, as_detections(truth, results))
    assert (found["AR1k"] > found["AR100"]) == (each > 1)

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(REAL / "coco_eval" / files[0])
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.params.useCats = 0
        evaluation.params.maxDets = [10, 100, 1000]
        evaluation.evaluate()
        evaluation.accumulate()
    for m, limit in ((1, "AR100"), (2, "AR1k")):
        for a, size in enumerate(("", "_s", "_m", "_l")):
            recall = evaluation.eval["recall"][:, 0, a, m]
            assert found[limit + size] == (pytest.approx(recall.mean(), abs=1e-9) if recall.min() > -1 else None), limit + size


# Average precision

APS = ("AP", "AP50", "AP75", "AP_s", "AP_m", "AP_l")
CATEGORIES = [{"id": 90, "name": "bee"}, {"id": 1, "name": "ant"}, {"id": 3, "name": "cow"}]  # not sorted by id, with gaps


def labelled(seed=0, **options):
    """`scene` in three categories of native ids 1, 3 and 90; labels are mostly right, so that AP is neither 0 nor 1."""
    truth, found = scene(seed, **options)
    rng = np.random.default_rng(seed)
    native = [c["id"] for c in CATEGORIES]
    for a in truth["annotations"]:
        a["category_id"] = int(rng.choice(native))
    labels = rng.integers(1, 4, len(found.scores))
    scores = found.scores * 0.2
    for n, (key, box) in enumerate(zip(found.image_ids, found.boxes, strict=True)):
        for a in truth["annotations"]:
            x, y, w, h = a["bbox"]
            if a["image_id"] == key and np.abs(box - [x, y, x + w, y + h]).max() < 0.2 * w and rng.random() < 0.8:
                labels[n], scores[n] = native.index(a["category_id"]) + 1, found.scores[n]
    return {**truth, "categories": CATEGORIES}, replace(found, labels=labels, scores=scores)


def both_ap(truth, detections, categories=CATEGORIES, bounds=BOUNDS, limit=100):
    """By either engine; equal to pycocotools' own summary at its standard limits where these are in force."""
    ours, reference = (average_precision(truth, detections, categories, bounds, limit, engine) for engine in ENGINES[1:])
    for one, other in zip(ours, reference, strict=True):
        assert list(one) == list(other)
        for name, value in one.items():
            assert value == (None if other[name] is None else pytest.approx(other[name], abs=1e-9)), name
    assert tuple(ours[0]) == APS and list(ours[1]) == [c["name"] for c in categories]
    return ours


def summary(truth, results, bounds=BOUNDS):
    """pycocotools alone, its limits as they are, with its own loader: the six APs, and AP of each category by id."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        assert evaluation.params.maxDets == [1, 10, 100]
        evaluation.params.areaRng = [[0, 1e10], [0, bounds[0]], list(bounds), [bounds[1], 1e10]]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        by_category = {}
        for k, key in enumerate(evaluation.params.catIds):
            values = evaluation.eval["precision"][:, :, k, 0, 2]
            by_category[int(key)] = values.mean()
    return evaluation.stats[:6], by_category


def assert_same(found, expected):
    assert found is None if expected == -1 else found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("bounds", [BOUNDS, (16.0**2, 48.0**2)])
@pytest.mark.parametrize(("seed", "tied", "crowds"), [(0, False, True), (1, True, True), (2, True, False)])
def test_precision_is_that_of_pycocotools_summary(seed, tied, crowds, bounds):
    truth, detections = labelled(seed, tied=tied, crowds=crowds, first_id=1)
    metrics, per_class = both_ap(truth, detections, bounds=bounds)
    stats, by_category = summary(truth, detections.coco_results(CATEGORIES), bounds)
    assert all(0 < value < 1 for value in metrics.values())
    for name, expected in zip(APS, stats, strict=True):
        assert_same(metrics[name], expected)
    for category in CATEGORIES:
        assert_same(per_class[category["name"]], by_category[category["id"]])
    assert len(set(per_class.values())) == 3
    assert np.mean(list(per_class.values())) == pytest.approx(metrics["AP"])


@pytest.mark.parametrize(("truth_file", "detections_file"), FILES)
def test_precision_on_real_sets_is_that_of_pycocotools_own_loader(truth_file, detections_file):
    truth, results = real(truth_file, detections_file)
    categories = truth["categories"]
    metrics, per_class = both_ap(truth, as_detections(truth, results), categories)
    stats, by_category = summary(truth, results)
    for name, expected in zip(APS, stats, strict=True):
        assert_same(metrics[name], expected)
    for category in categories:
        assert_same(per_class[category["name"]], by_category[category["id"]])
    assert np.mean([v for v in per_class.values() if v is not None]) == pytest.approx(metrics["AP"])


@pytest.mark.parametrize(
    ("files", "expected", "digits"),
    [
        (FILES[0], "expected_bbox.json", {"pycocotools_full_precision": 1e-9, "published": 5e-4}),
        (FILES[1], "expected_padilla.json", {"pycocotools": 1e-9, "published_tol_1e6": 1e-6}),
        (FILES[2], "expected_voc100.json", {"pycocotools": 1e-9}),
    ],
)
def test_precision_on_real_sets_is_what_others_have_noted(files, expected, digits):
    """Figures that stand in files, to the digits that they were noted with. Their recall is by category and ours is not."""
    truth, results = real(*files)
    metrics, _ = both_ap(truth, as_detections(truth, results), truth["categories"])
    noted = json.loads((REAL / "coco_eval" / expected).read_text())
    assert noted.keys() >= digits.keys()
    for source, tolerance in digits.items():
        for name, value in zip(APS, noted[source], strict=False):
            assert metrics[name] == pytest.approx(value, abs=tolerance), (source, name)


def test_all_found_is_1_and_nothing_found_is_0():
    truth, detections = perfect(20, 50, 200, first_id=0)
    categories = truth["categories"]
    metrics, per_class = both_ap(truth, replace(detections, labels=np.ones(3, np.int64)), categories)
    assert metrics == pytest.approx(dict.fromkeys(APS, 1.0)) and per_class == pytest.approx({"thing": 1.0})
    metrics, per_class = both_ap(truth, replace(nothing(), labels=np.zeros(0, np.int64)), categories)
    assert metrics == dict.fromkeys(APS, 0.0) and per_class == {"thing": 0.0}


def test_a_box_off_by_a_fifth_counts_by_its_overlap():
    """IoU is 0.8 / 1.2 = 0.67: found at the thresholds .50, .55, .60 and .65 of ten."""
    truth, detections = perfect(50)
    shifted = detections.boxes + np.array([10, 0, 10, 0], np.float32)
    metrics, _ = both_ap(truth, replace(detections, boxes=shifted, labels=np.ones(1, np.int64)), truth["categories"])
    assert metrics == {**dict.fromkeys(("AP", "AP_m"), pytest.approx(0.4)), "AP50": 1, "AP75": 0, "AP_s": None, "AP_l": None}


def test_a_false_alarm_costs_when_its_score_is_higher():
    truth, detections = perfect(50)
    boxes = np.concatenate([detections.boxes, [[500, 500, 550, 550]]]).astype(np.float32)

    def ap(scores):
        found = DetectionSet(np.ones(2, np.int64), boxes, np.array(scores, np.float32), np.ones(2, np.int64))
        return both_ap(truth, found, truth["categories"])[0]["AP"]

    assert ap([0.9, 0.1]) == 1
    assert ap([0.1, 0.9]) == pytest.approx(0.5)


def test_mixed_up_labels_lower_precision_and_leave_recall():
    truth, detections = labelled()
    mixed = replace(detections, labels=detections.labels % 3 + 1)
    before, after = (average_precision(truth, found, CATEGORIES, BOUNDS)[0]["AP"] for found in (detections, mixed))
    assert after < before / 3
    alone = average_recall(truth, replace(detections, labels=None), BOUNDS)
    assert average_recall(truth, detections, BOUNDS) == average_recall(truth, mixed, BOUNDS) == alone


def test_crowd_regions_neither_help_nor_hurt():
    truth, detections = perfect(20, 50)
    found = replace(detections, labels=np.ones(2, np.int64))
    truth["annotations"][0]["iscrowd"] = 1
    assert both_ap(truth, found, truth["categories"])[0]["AP"] == pytest.approx(1)
    truth["annotations"][1]["iscrowd"] = 1
    metrics, per_class = both_ap(truth, found, truth["categories"])
    assert set(metrics.values()) == {None} and per_class == {"thing": None}
    del truth["annotations"][1]["iscrowd"]  # not every file has the key
    assert both_ap(truth, found, truth["categories"])[0]["AP"] == pytest.approx(1)


def test_a_category_without_objects_is_undefined_and_not_in_the_mean():
    truth, detections = labelled()
    truth["annotations"] = [a for a in truth["annotations"] if a["category_id"] != 90]
    metrics, per_class = both_ap(truth, detections)
    assert per_class["bee"] is None
    assert metrics["AP"] == pytest.approx((per_class["ant"] + per_class["cow"]) / 2)


@pytest.mark.parametrize("limit", [100, 120, 150])
def test_an_images_best_hundred_of_a_category_count(limit):
    """As one category, 150 objects found exactly, the later ones worse in score; as two, each has a limit of its own."""
    truth, detections = perfect(*[10] * 150)
    categories = [{"id": 1, "name": "thing"}, {"id": 2, "name": "other"}]
    found = replace(detections, scores=np.linspace(0.9, 0.1, 150).astype(np.float32), labels=np.ones(150, np.int64))
    exact = (np.linspace(0, 1, 101) <= limit / 150 + 1e-9).mean()  # precision is 1 up to that recall and 0 beyond
    assert both_ap(truth, found, categories, limit=limit)[0]["AP"] == pytest.approx(exact)
    if limit == 100:
        best = DetectionSet(found.image_ids[:100], found.boxes[:100], found.scores[:100], found.labels[:100])
        assert average_precision(truth, best, categories) == average_precision(truth, found, categories)
    for n in range(75):
        truth["annotations"][n]["category_id"], found.labels[n] = 2, 2
    assert both_ap(truth, found, categories, limit=limit)[0]["AP"] == pytest.approx(1)


def test_categories_of_one_name_are_told_apart():
    truth, detections = labelled()
    names = [{**c, "name": "insect" if c["id"] != 3 else "cow"} for c in CATEGORIES]
    metrics, per_class = average_precision(truth, detections, names, BOUNDS)
    expected = average_precision(truth, detections, CATEGORIES, BOUNDS)
    assert list(per_class) == ["insect (id 90)", "insect (id 1)", "cow"]
    assert metrics == expected[0] and list(per_class.values()) == list(expected[1].values())


def test_results_have_the_native_category_ids():
    found = replace(perfect(20, 50, 70)[1], labels=np.array([2, 1, 3]))
    assert [d["category_id"] for d in found.coco_results(CATEGORIES)] == [1, 90, 3]
    assert [d["category_id"] for d in found.coco_results()] == [1, 1, 1]
    assert found.coco_results()[1] == {**found.coco_results(CATEGORIES)[1], "category_id": 1}


@pytest.mark.parametrize("labels", [None, [1, 0], [4, 1]])
def test_labels_that_name_no_category_are_refused(labels):
    """0 is the background: as an index it would be the last category."""
    truth, detections = perfect(20, 50)
    found = replace(detections, labels=labels and np.array(labels))
    with pytest.raises(ValueError, match="labels"):
        average_precision(truth, found, CATEGORIES)

"""Masks of COCO files: every way to write one gives its pixels, and whatever is broken is refused or repaired by name."""

import json
import random

import numpy as np
import pytest
from coco_sets import REAL, base, split, write, write_splits
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from fpn_ablate.cli.main import main
from fpn_ablate.data.checks.examine import examine
from fpn_ablate.data.checks.findings import BROKEN, KINDS, NOTE
from fpn_ablate.data.checks.segmentations import to_mask
from fpn_ablate.data.coco import CocoDataset
from fpn_ablate.engine import inputs
from fpn_ablate.utils import rle, stamps
from fpn_ablate.utils.errors import UserError

SIZES = {42: (40, 60), 7: (50, 50)}
SQUARE, TRIANGLE = [20, 10, 50, 10, 50, 30, 20, 30], [0, 0, 15.5, 3, 4, 22.25]


def ring() -> np.ndarray:
    """A square with a hole, in the image 7."""
    bitmap = np.zeros(SIZES[7], np.uint8)
    bitmap[6:18, 5:15] = 1
    bitmap[10:14, 8:12] = 0
    return bitmap


def runs_of(bitmap: np.ndarray) -> list[int]:
    flat = bitmap.flatten(order="F")
    ends = np.flatnonzero(np.diff(flat)) + 1
    return np.diff([0, *([0] if flat[0] else []), *ends, len(flat)]).tolist()


def masked() -> dict:
    """The set of `base` with compressed run lengths (a hole), two polygons, one polygon, and a crowd as a list of runs."""
    data = base()
    crowd = np.zeros(SIZES[42], np.uint8)
    crowd[10:30, 20:50] = 1
    compressed = rle.coco_object(rle.encode(ring()[None])[0], SIZES[7])
    counts = {"size": [40, 60], "counts": runs_of(crowd)}
    for annotation, mask in zip(
        data["annotations"], (compressed, [SQUARE, TRIANGLE], [[1, 2, 4, 2, 4, 6, 1, 6]], counts), strict=True
    ):
        annotation["segmentation"] = mask
    return data


def read(root, raw, **options) -> CocoDataset:
    return CocoDataset(*write(root, raw), "set", masks=True, **options)


def faults(root, raw) -> list:
    return examine(*write(root, raw), masks=True).findings


def with_mask(mask, data=None) -> dict:
    """The set with another mask of annotation 12, in the image 42 of 60 x 40 pixels."""
    data = data or masked()
    data["annotations"][1]["segmentation"] = mask
    return data


def test_each_way_to_write_a_mask_gives_its_pixels(tmp_path):
    raw = masked()
    data = read(tmp_path, raw)
    reference = COCO()
    reference.dataset = json.loads(json.dumps(raw))
    reference.createIndex()
    read_back = {a["id"]: a for a in data.coco()["annotations"]}
    for annotation in raw["annotations"]:
        expected = reference.annToMask(annotation)
        assert np.array_equal(coco_mask.decode(read_back[annotation["id"]]["segmentation"]), expected)
    sample = data[data.image_ids.index(7)]
    assert np.array_equal(rle.decode(sample.masks, SIZES[7])[0], ring())
    assert data.has_masks and [len(data[n].masks) for n in range(3)] == [len(data[n].boxes) for n in range(3)]


def test_masks_are_the_same_where_images_stand_behind_annotations(tmp_path):
    raw = masked()
    first = read(tmp_path, raw)
    behind = read(tmp_path, {key: raw[key] for key in ("annotations", "images", "categories")})
    assert first.coco() == behind.coco() and first.digest == behind.digest


def test_the_digest_holds_masks_only_where_they_are_read(tmp_path):
    digests = {}
    for name, raw in (("none", base()), ("masks", masked()), ("others", with_mask([TRIANGLE]))):
        digests[name] = CocoDataset(*write(tmp_path, raw), "set").digest
    assert len(set(digests.values())) == 1 and not CocoDataset(*write(tmp_path, masked()), "set").has_masks
    assert len({*digests.values(), read(tmp_path, masked()).digest, read(tmp_path, with_mask([TRIANGLE])).digest}) == 3


FAULTS = {
    "absent": (None, "mask-missing", "dropped"),
    "empty list": ([], "mask-missing", "dropped"),
    "two points": ([[1, 1, 9, 9]], "mask-points", "dropped"),
    "one point beside a polygon": ([[1, 1], SQUARE], "mask-points", "clipped"),
    "odd": ([[1, 1, 9, 1, 9, 9, 3]], "mask-points", "dropped"),
    "no pixel": ([[5, 5, 5, 5, 5, 5]], "mask-empty", "dropped"),
    "no pixel in runs": ({"size": [40, 60], "counts": [2400]}, "mask-empty", "dropped"),
    "over the border": ([[50, 10, 70, 10, 70, 30, 50, 30]], "mask-outside", "clipped"),
    "outside": ([[70, 10, 80, 10, 80, 30, 70, 30]], "mask-outside", "dropped"),
    "far away": ([[-1e200, -1e200, 1e200, -1e200, 30, 1e200]], "mask-outside", "clipped"),
    "rounded": ([[50, 10, 60.9, 10, 60.9, 30, 50, 30]], "mask-rounded", None),
    "crossing": ([[10, 5, 50, 35, 50, 5, 10, 35]], "mask-crossing", None),
    "elsewhere": ([[0, 0, 5, 0, 5, 5, 0, 5]], "mask-unlike-box", None),
    "size": ({"size": [60, 40], "counts": [0, 2400]}, "mask-size", "refused"),
    "no size": ({"counts": [0, 2400]}, "mask-size", "refused"),
    "runs too long": ({"size": [40, 60], "counts": [5, 2400]}, "mask-counts", "refused"),
    "negative runs": ({"size": [40, 60], "counts": [2400, -5, 5]}, "mask-counts", "refused"),
    "no runs": ({"size": [40, 60]}, "mask-counts", "refused"),
    "cut text": ({"size": [40, 60], "counts": "PPYo0P"}, "mask-counts", "refused"),
    "no run lengths": ({"size": [40, 60], "counts": "äö"}, "mask-counts", "refused"),
    "text": ("1 2 3 4 5 6", "wrong-type", "refused"),
    "flat": (SQUARE, "wrong-type", "refused"),
    "words": ([["a", "b", "c", "d", "e", "f"]], "wrong-type", "refused"),
    "NaN": ([[float("nan"), 1, 2, 3, 4, 5]], "non-finite", "refused"),
    "beyond floats": ([[10**400, 1, 2, 3, 4, 5]], "non-finite", "refused"),
}


def test_every_kind_of_fault_of_a_mask_is_here():
    assert {kind for kind in KINDS if kind.startswith("mask-")} <= {kind for _, kind, _ in FAULTS.values()}


@pytest.mark.parametrize(("mask", "kind", "repair"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_named_and_refused_or_repaired(tmp_path, mask, kind, repair):
    found = [f for f in faults(tmp_path, with_mask(mask)) if f.kind != "mask-unlike-box" or kind == f.kind]
    assert [(f.kind, f.image_id, f.annotation_id) for f in found] == [(kind, 42, 12)]
    assert str(tmp_path / "instances.json") in str(found[0]) and KINDS[kind][1] in str(found[0])
    if repair is None:
        assert KINDS[kind][0] == NOTE
        assert len(read(tmp_path, with_mask(mask)).coco()["annotations"]) == 4
        return
    with pytest.raises(UserError, match=rf"{kind}.*image id 42, annotation id 12(?s:.*)doctor .* --masks"):
        read(tmp_path, with_mask(mask))
    if repair == "refused":
        assert KINDS[kind][0] == BROKEN
        with pytest.raises(UserError, match=kind):
            read(tmp_path, with_mask(mask), invalid="clip")
        return
    dropped = read(tmp_path, with_mask(mask), invalid="drop")
    assert [a["id"] for a in dropped.coco()["annotations"]] == [14, 11, 13]
    assert dropped.repairs == {"objects dropped for their masks": 1}
    clipped = read(tmp_path, with_mask(mask), invalid="clip")
    assert clipped.repairs == {"masks clipped" if repair == "clipped" else "objects dropped for their masks": 1}
    assert len(clipped.coco()["annotations"]) == (4 if repair == "clipped" else 3)
    assert all(rle.areas(clipped[n].masks, tuple(clipped.sizes[n])).all() for n in range(3))


def test_a_clipped_mask_is_what_lies_in_the_image(tmp_path):
    clipped = read(tmp_path, with_mask([[50, 10, 70, 10, 70, 30, 50, 30], [1, 1]]), invalid="clip")
    mask = rle.decode(clipped[clipped.image_ids.index(42)].masks, SIZES[42])[0]
    assert mask[10:30, 50:].all() and mask.sum() == 200


def test_an_object_with_a_bad_box_and_a_bad_mask_is_counted_once(tmp_path):
    raw = with_mask([])
    raw["annotations"][1]["bbox"] = [5, 5, 0, 0]
    assert read(tmp_path, raw, invalid="drop").repairs == {"boxes dropped": 1}


def test_a_set_without_masks_is_refused_by_a_task_that_needs_them(tmp_path, config):
    (finding,) = faults(tmp_path, base())
    assert finding.kind == "masks-missing" and "none of 4" in finding.value
    root = write_splits(tmp_path / "splits", split([(1, 1, [5, 6, 10, 12], 0)]), split([(1, 3, [5, 6, 10, 12], 0)]))
    cfg = config("data=coco", root)
    assert inputs.load_data(cfg.data, cfg.recipe, "train") and not inputs.load_data(cfg.data, cfg.recipe, "train")[0].has_masks
    for mode in ("train", "evaluate"):
        with pytest.raises(UserError, match=r"masks-missing.*choose a task of boxes alone"):
            inputs.load_data(cfg.data, cfg.recipe, mode, masks=True)


def test_a_set_that_was_read_for_boxes_is_read_again_for_masks(tmp_path, config, monkeypatch):
    halves = [split([(1, 1, [5, 6, 10, 12], 0)]), split([(1, 3, [5, 6, 10, 12], 0)])]
    for half in halves:
        half["annotations"][0]["segmentation"] = [[5, 6, 15, 6, 15, 18, 5, 18]]
    cfg = config("data=coco", write_splits(tmp_path, *halves))
    monkeypatch.setattr(inputs, "_cache", {})
    monkeypatch.setattr(stamps, "RECENT", -60)
    boxes, masks = (inputs.load_data(cfg.data, cfg.recipe, "train", needed) for needed in (False, True))
    assert [one.has_masks for one in (*boxes, *masks)] == [False, False, True, True]
    assert boxes[0][0].masks is None and rle.areas(masks[0][0].masks, (40, 60)).tolist() == [120.0]
    assert "segmentation" in masks[1].coco()["annotations"][0] and "segmentation" not in boxes[1].coco()["annotations"][0]


def test_doctor_examines_masks_on_request(tmp_path, capsys):
    files = [str(path) for path in write(tmp_path, with_mask([[1, 1, 9, 9]]))]
    assert main(["doctor", *files]) == 0
    assert main(["doctor", *files, "--masks"]) == 1
    assert "mask-points" in capsys.readouterr().out


@pytest.mark.parametrize("seed", range(3))
def test_run_lengths_are_read_as_pycocotools_writes_them(seed):
    rng = np.random.default_rng(seed)
    for _ in range(20):
        size = tuple(rng.integers(1, 90, 2).tolist())
        bitmap = (rng.random(size) < rng.random()).astype(np.uint8)
        (counts,) = rle.encode(bitmap[None])
        runs = rle.runs(counts.decode())
        assert runs == runs_of(bitmap) and rle.from_runs(runs, size) == counts
        # A run of 0 splits one in two.
        n = int(rng.integers(len(runs)))
        cut = int(rng.integers(runs[n] + 1))
        assert rle.from_runs([*runs[:n], cut, 0, runs[n] - cut, *runs[n + 1 :]], size) == counts


def test_no_text_of_run_lengths_gets_past_the_check():
    generator, size, valid = random.Random(0), SIZES[7], list(rle.encode(ring()[None])[0].decode())
    passed = 0
    for _ in range(3000):
        text = list(valid)
        for _ in range(generator.randrange(1, 4)):
            text[generator.randrange(len(text))] = chr(generator.randrange(40, 130))
        mask = to_mask({"size": list(size), "counts": "".join(text[: generator.randrange(len(text) + 30)])}, size)
        if isinstance(mask, bytes):
            assert coco_mask.decode(rle.coco_object(mask, size)).sum() == sum(rle.runs(mask.decode())[1::2]) > 0
            passed += 1
    assert 0 < passed < 300


@pytest.mark.skipif(not (REAL / "coco_eval").is_dir(), reason="needs real data")
def test_masks_of_coco_are_those_of_its_own_api():
    file = REAL / "coco_eval" / "instances_val2014_100.json"
    report = examine(file, masks=True)
    assert report.sound and not [f for f in report.findings if f.kind.startswith("mask")]
    reference, table = COCO(str(file)), report.annotations
    for mask, key in zip(table.masks, table.ids.tolist(), strict=True):
        assert mask == reference.annToRLE(reference.anns[key])["counts"]


def test_an_area_that_is_missing_or_cut_is_that_of_the_mask(tmp_path):
    """A thin diagonal is small, whatever its box says."""
    data = base()
    data["annotations"] = data["annotations"][:1]
    row = data["annotations"][0]
    row |= {"bbox": [5, 5, 35, 30], "segmentation": [[5, 5, 9, 5, 40, 35, 36, 35]]}
    row.pop("area", None)
    files = write(tmp_path, data)
    drawn = CocoDataset(*files, "x", masks=True).coco()["annotations"][0]
    pixels = rle.areas([drawn["segmentation"]["counts"].encode()], tuple(drawn["segmentation"]["size"]))[0]
    assert drawn["area"] == pixels < 200
    assert CocoDataset(*files, "x").coco()["annotations"][0]["area"] == 35 * 30


def test_without_its_masks_a_set_is_the_same_data(tmp_path):
    """The RPN that a run with masks stands on reads none, and is that of a run without."""
    files = write(tmp_path, masked())
    with_masks, boxes = CocoDataset(*files, "x", masks=True), CocoDataset(*files, "x")
    assert with_masks.box_digest == boxes.box_digest == boxes.digest != with_masks.digest


@pytest.mark.parametrize("place", ["videos", "attributes"])
def test_what_else_has_an_id_and_a_size_is_no_image(tmp_path, place):
    data, other = masked(), [{"id": image["id"], "width": 200, "height": 100} for image in masked()["images"]]
    if place == "videos":
        data = {"images": data.pop("images"), "videos": other, **data}
    else:
        for row in data["annotations"]:
            row["attributes"] = {"id": row["image_id"], "width": 200, "height": 100}
    data = {"images": data.pop("images"), **data}
    found, expected = (CocoDataset(*write(tmp_path / name, d), "x", masks=True) for name, d in (("a", data), ("b", masked())))
    assert found.digest == expected.digest

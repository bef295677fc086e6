"""COCO-format sets as training data: what is read, mended, refused, and sent to workers."""

import json
import logging
import multiprocessing
import os
import pickle
import re
import shutil

import numpy as np
import pytest
from coco_sets import CATEGORIES, REAL, base, picture, rewrite, write, write_splits
from PIL import Image

from fpn_ablate.data.coco import CocoDataset, load
from fpn_ablate.data.loader import evaluation_batches
from fpn_ablate.data.transforms import Resize
from fpn_ablate.doctor.splits import splits_of
from fpn_ablate.engine.inputs import load_data
from fpn_ablate.utils.errors import UserError


def by_id(entries):
    return sorted(entries, key=lambda entry: entry["id"])


def one_image(root, image: Image.Image, name: str, height: int, width: int, **save) -> CocoDataset:
    """A set of one picture, saved under `name` and annotated as height x width."""
    data = {"categories": CATEGORIES, "annotations": [], "images": []}
    data["images"].append({"id": 5, "file_name": name, "height": height, "width": width})
    file, images = write(root, data)
    image.save(images / name, **save)
    return CocoDataset(file, images, "one")


def test_category_ids_with_gaps_go_there_and_back(tmp_path):
    data = CocoDataset(*write(tmp_path, base()), "set")
    assert data.categories == CATEGORIES  # sorted by id, whatever the file's order
    samples = [data[n] for n in range(len(data))]
    natives = [CATEGORIES[label - 1]["id"] for one in samples for label in one.labels.tolist()]
    assert natives == [3, 1, 90, 1]  # image 42, then 7, each in the file's order
    assert {a["id"]: a["category_id"] for a in data.coco()["annotations"]} == {11: 90, 12: 3, 13: 1, 14: 1}


def test_samples_hold_the_objects_of_their_image(tmp_path):
    data = CocoDataset(*write(tmp_path, base()), "set")
    assert list(data.image_ids) == [42, 7, 9] and len(data) == 3
    assert data.sizes.tolist() == [list(data[n].image.shape[:2]) for n in range(3)]
    first, second, third = (data[n] for n in range(3))
    assert first.image.shape == (40, 60, 3) and first.image_id == 42
    assert first.boxes.tolist() == [[0, 0, 60, 40], [20, 10, 50, 30]] and first.crowd.tolist() == [False, True]
    assert second.boxes.tolist() == [[5, 6, 15, 18.5], [1, 2, 4, 6]]
    assert np.array_equal(second.image, picture(50, 50, 1))
    assert third.boxes.shape == (0, 4) and third.labels.shape == third.crowd.shape == (0,)
    for one in (first, second, third):
        assert (one.image.dtype, one.boxes.dtype) == (np.uint8, np.float32)
        assert (one.labels.dtype, one.crowd.dtype) == (np.int64, np.bool_)


def test_objects_keep_the_order_of_the_file(tmp_path):
    raw = base()
    images = [42, 7, 9] * 300
    raw["annotations"] = [
        {"id": n + 1, "image_id": image, "category_id": 1, "bbox": [0, 0, 1 + n / 100, 5]} for n, image in enumerate(images)
    ]
    data = CocoDataset(*write(tmp_path, raw), "set")
    for n in range(3):
        widths = [a["bbox"][2] for a in raw["annotations"] if a["image_id"] == data.image_ids[n]]
        np.testing.assert_allclose(data[n].boxes[:, 2], widths, rtol=1e-6)


def test_ground_truth_equals_the_file_and_survives_a_second_reading(tmp_path):
    raw = base()
    file, images = write(tmp_path, raw)
    data = CocoDataset(file, images, "set")
    truth = data.coco()
    for key in ("images", "annotations", "categories"):
        assert by_id(truth[key]) == by_id(raw[key])
    again = CocoDataset(rewrite(tmp_path, truth), images, "set")
    assert again.digest == data.digest and again.coco() == truth


def test_images_without_objects_are_left_out_of_training_alone(tmp_path):
    raw = base()
    raw["annotations"] = [a for a in raw["annotations"] if a["id"] in (11, 14)]  # image 42 keeps a crowd region alone
    file, images = write(tmp_path, raw)
    data = CocoDataset(file, images, "set", keep_empty=False)
    assert list(data.image_ids) == [7] and len(data) == 1 and data[0].image_id == 7
    assert data.sizes.tolist() == [[50, 50]]
    assert data.repairs == {"images without objects left out": 2}
    assert [entry["id"] for entry in data.coco()["images"]] == [42, 7, 9]
    with pytest.raises(IndexError):
        data[1]


def test_a_set_without_any_object_is_legal(tmp_path):
    data = CocoDataset(*write(tmp_path, base() | {"annotations": []}), "set")
    assert [len(data[n].boxes) for n in range(3)] == [0, 0, 0]
    assert data.coco()["annotations"] == []


def test_missing_area_falls_back_to_the_box_and_is_said_once(tmp_path, caplog):
    raw = base()
    for entry in raw["annotations"]:
        entry.pop("area")
        entry.pop("iscrowd")
    with caplog.at_level(logging.WARNING):
        data = CocoDataset(*write(tmp_path, raw), "set")
    assert len(caplog.records) == 1 and "area" in caplog.text
    areas = {a["id"]: (a["area"], a["iscrowd"]) for a in data.coco()["annotations"]}
    assert areas == {11: (125.0, 0), 12: (2400.0, 0), 13: (12.0, 0), 14: (600.0, 0)}


def test_annotation_id_zero_is_replaced_in_the_ground_truth(tmp_path):
    raw = base()
    raw["annotations"][0]["id"] = 0
    ids = [a["id"] for a in CocoDataset(*write(tmp_path, raw), "set").coco()["annotations"]]
    assert 0 not in ids and len(set(ids)) == 4 and set(ids) >= {12, 13, 14}


def spelt_by(spelling):
    def spell(raw):
        for entry in (*raw["images"], *raw["annotations"], *raw["categories"]):
            numbers = ("id", "image_id", "category_id", "height", "width", "iscrowd")
            entry.update({key: spelling(value) for key, value in entry.items() if key in numbers})

    return spell


def repeated_entries(raw):
    raw["categories"] += raw["categories"] + raw["categories"]
    raw["images"] += raw["images"][:1]


def unusable_ids(raw):
    for entry, key in zip(raw["annotations"], (0, 12, 12, 2**70), strict=True):
        entry["id"] = key


@pytest.mark.parametrize(
    ("spell", "changed"), [(spelt_by(float), 10), (spelt_by(str), 10), (repeated_entries, 7), (unusable_ids, 3)]
)
def test_another_spelling_of_one_meaning_is_taken_counted_and_told(tmp_path, caplog, spell, changed):
    raw = base()
    spell(raw)
    with caplog.at_level(logging.WARNING):
        data = CocoDataset(*write(tmp_path, raw), "set")
    assert sum(data.repairs.values()) == changed
    assert len(caplog.records) == len(data.repairs) and all(f"{n} {what}" in caplog.text for what, n in data.repairs.items())
    truth, expected = data.coco(), CocoDataset(*write(tmp_path, base()), "set").coco()
    ids = [[entry.pop("id") for entry in group["annotations"]] for group in (truth, expected)]
    assert truth == expected and len({*ids[0]} - {0}) == 4 and max(ids[0]) <= 2**53
    assert ids[0] == ids[1] or spell is unusable_ids


def test_objects_to_ignore_are_treated_like_crowds_and_told(tmp_path, caplog):
    raw = base()
    changed = {11: {"ignore": 1}, 12: {"ignore": 0}, 13: {"ignore": True}, 14: {"ignore": 1}}  # 14 is a crowd anyway
    for entry in raw["annotations"]:
        entry.update(changed[entry["id"]])
    with caplog.at_level(logging.WARNING):
        data = CocoDataset(*write(tmp_path, raw), "set")
    assert {a["id"]: a["iscrowd"] for a in data.coco()["annotations"]} == {11: 1, 12: 0, 13: 1, 14: 1}
    assert [crowd for n in range(3) for crowd in data[n].crowd.tolist()] == [False, True, True, True]
    assert list(data.repairs.values()) == [2] and "2 of 4 annotations have `ignore` = 1" in caplog.text
    assert data.digest != CocoDataset(rewrite(tmp_path, base()), tmp_path / "images", "set").digest


BOXES = [[5, 6, 10, 12.5], [0, 0, 50, 40], [1, 2, 3, 4], [20, 10, 30, 20], [8, 8, 2, 1]]
# Exact, thin, inclusive corners.
SOUND_AREAS = [
    [125, 2000, 12, 600, 2],
    [3, 30, 1, 9, 1],
    [11 * 13.5, 51 * 41, 20, 31 * 21, 6],
]


@pytest.mark.parametrize(
    ("areas", "wrong"),
    [
        *((areas, 0) for areas in SOUND_AREAS),
        ([0] * 5, 5),
        ([1.0] * 5, 5),
        ([200.0] * 5, 5),
        ([0.03, 0.5, 0.003, 0.15, 0.0005], 5),  # fractions of the image
        ([12500, 200000, 1200, 60000, 200], 5),
        ([100, 0, 10, 500, 0], 1),  # a mask may miss the smallest
        ([100, 1000, 10, 1200, 1], 1),
    ],
)
def test_an_area_that_its_box_rules_out_is_replaced_and_told(tmp_path, caplog, areas, wrong):
    raw, entry = base(), base()["annotations"][0]
    raw["annotations"] = [
        entry | {"id": n, "image_id": 42, "bbox": box, "area": area}
        for n, (box, area) in enumerate(zip(BOXES, areas, strict=True), start=1)
    ]
    with caplog.at_level(logging.WARNING):
        data = CocoDataset(*write(tmp_path, raw), "set")
    seen = [a["area"] for a in data.coco()["annotations"]]
    boxes = [w * h for *_, w, h in BOXES]
    assert sum(one != area for one, area in zip(seen, areas, strict=True)) == wrong == sum(data.repairs.values())
    assert all(one in (area, box) for one, area, box in zip(seen, areas, boxes, strict=True))
    assert (f"{wrong} of 5 `area` cannot be right" in caplog.text) == bool(wrong)


# --- pixels


@pytest.mark.parametrize("mode", ["L", "1", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_every_pixel_format_comes_as_rgb(tmp_path, mode):
    flat = np.full((30, 20, 3), 255, dtype=np.uint8)
    flat[:15] = 0
    if mode not in ("L", "1", "LA"):
        flat[:, :10] = (255, 0, 0)
    name = "x.tif" if mode in ("CMYK", "YCbCr") else "x.png"
    seen = one_image(tmp_path, Image.fromarray(flat).convert(mode), name, 30, 20)[0].image
    assert seen.shape == (30, 20, 3) and seen.dtype == np.uint8
    assert np.abs(seen.astype(int) - flat).max() <= 2


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_jpeg(tmp_path, mode):
    flat = np.full((30, 20, 3), 150, dtype=np.uint8)
    if mode == "CMYK":
        flat[:] = (200, 60, 90)
    seen = one_image(tmp_path, Image.fromarray(flat).convert(mode), "x.jpg", 30, 20)[0].image
    assert np.abs(seen.astype(int) - flat).max() <= 6


def test_transparency_is_dropped_without_a_warning(tmp_path, recwarn):
    palette = Image.new("P", (20, 30), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    seen = one_image(tmp_path, palette, "x.png", 30, 20, transparency=bytes([0, 7]))[0].image
    assert (seen == (200, 100, 50)).all() and not recwarn.list


def test_16_bit_grey_is_scaled_by_its_full_range(tmp_path):
    grey = np.linspace(0, 65535, 600).astype(np.uint16).reshape(30, 20)
    seen = one_image(tmp_path, Image.fromarray(grey), "x.png", 30, 20)[0].image
    assert np.array_equal(seen, np.repeat(np.round(grey / 257).astype(np.uint8)[:, :, None], 3, axis=2))


ROTATIONS = {  # EXIF orientation: how the stored picture must be turned
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_is_followed_where_the_annotated_size_asks_for_it(tmp_path, orientation):
    stored = picture(20, 30)
    exif = Image.Exif()
    exif[274] = orientation
    image = Image.fromarray(stored)
    as_stored = one_image(tmp_path / "stored", image, "x.png", 20, 30, exif=exif)
    assert np.array_equal(as_stored[0].image, stored)
    square = one_image(tmp_path / "square", Image.fromarray(stored[:20, :20]), "x.png", 20, 20, exif=exif)
    assert np.array_equal(square[0].image, stored[:20, :20])
    if orientation in ROTATIONS:
        turned = one_image(tmp_path / "turned", image, "x.png", 30, 20, exif=exif)
        assert np.array_equal(turned[0].image, ROTATIONS[orientation](stored))
    else:
        with pytest.raises(UserError, match="30x20, annotated as 20x30"):
            one_image(tmp_path / "turned", image, "x.png", 30, 20, exif=exif)


@pytest.mark.parametrize("damage", ["cut", "gone", "other size"])
def test_damage_after_construction_names_file_and_image(tmp_path, damage):
    file, images = write(tmp_path, base())
    data = CocoDataset(file, images, "set")
    target = images / "a.jpg"
    if damage == "cut":
        target.write_bytes(target.read_bytes()[:-500])
    elif damage == "gone":
        target.unlink()
    else:
        Image.fromarray(picture(8, 8)).save(target)
    with pytest.raises(UserError, match=r"a\.jpg, image id 42: cannot be read.*Fix: replace"):
        data[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_met_by_a_worker_is_told_without_a_traceback(tmp_path, workers):
    file, images = write(tmp_path, base())
    data = CocoDataset(file, images, "set")
    (images / "a.jpg").unlink()
    batches = evaluation_batches(data, batch_size=1, resize=Resize(32, 64), workers=workers, count=None)
    with pytest.raises(UserError, match=r"a\.jpg, image id 42: cannot be read") as told:
        list(batches)
    assert len(str(told.value).splitlines()) == 1
    assert not multiprocessing.active_children()  # the program's end would wait for them, ten seconds


# --- bad boxes


def spoilt(root):
    """The base set with two boxes across the border (11, 14), one empty (13) and one wholly outside (15)."""
    raw = base()
    raw["annotations"][0]["bbox"] = [45, -6, 10, 12.5]
    raw["annotations"][2]["bbox"] = [1, 2, 3, 0]
    raw["annotations"][3]["bbox"] = [20, 10, 45, 20]
    raw["annotations"].append({"id": 15, "image_id": 42, "category_id": 1, "bbox": [70, 0, 5, 5], "iscrowd": 0})
    return write(root, raw)


def test_bad_boxes_are_refused_clipped_or_dropped(tmp_path):
    file, images = spoilt(tmp_path)
    with pytest.raises(UserError, match="4 problems") as refusal:
        CocoDataset(file, images, "set")
    assert "3 box-outside" in str(refusal.value) and "1 box-empty" in str(refusal.value)
    dropped = CocoDataset(file, images, "set", invalid="drop")
    assert [a["id"] for a in dropped.coco()["annotations"]] == [12] and dropped.repairs == {"boxes dropped": 4}
    assert [len(dropped[n].boxes) for n in range(3)] == [1, 0, 0]
    clipped = CocoDataset(file, images, "set", invalid="clip")
    assert clipped.repairs == {"boxes clipped": 2, "boxes dropped": 2}
    truth = {a["id"]: (a["bbox"], a["area"]) for a in clipped.coco()["annotations"]}
    assert truth == {
        11: ([45, 0, 5, 6.5], 32.5),  # the area shrinks to what is left
        12: ([0, 0, 60, 40], 2400),
        14: ([20, 10, 40, 20], 500),  # a mask's area that still fits stays
    }
    assert clipped[1].boxes.tolist() == [[45, 0, 50, 6.5]]


@pytest.mark.parametrize("setting", ["clip", "drop"])
def test_no_setting_lets_broken_structure_through(tmp_path, setting):
    raw = base()
    raw["annotations"][0]["category_id"] = 2
    file, images = write(tmp_path, raw)
    (images / "a.jpg").write_bytes((images / "a.jpg").read_bytes()[:-100])
    with pytest.raises(UserError, match="unknown-category") as refusal:
        CocoDataset(file, images, "set", invalid=setting)
    assert "image-truncated" in str(refusal.value)


def test_a_pixel_over_the_border_is_rounding_and_stays_in_the_ground_truth(tmp_path):
    raw = base()
    raw["annotations"][0]["bbox"] = [-1, 6, 52, 12.5]
    data = CocoDataset(*write(tmp_path, raw), "set")
    assert data.repairs == {"boxes clipped by up to 1 px": 1}
    assert data[1].boxes[0].tolist() == [0, 6, 50, 18.5]
    assert next(a for a in data.coco()["annotations"] if a["id"] == 11)["bbox"] == [-1, 6, 52, 12.5]
    raw["annotations"][0]["bbox"] = [-1.01, 6, 52, 12.5]
    with pytest.raises(UserError, match="box-outside"):
        CocoDataset(rewrite(tmp_path, raw), tmp_path / "images", "set")


# --- identity


def test_digest_covers_what_decides_the_samples_and_nothing_else(tmp_path):
    file, images = write(tmp_path / "one", base())

    def digest(change=lambda raw: None, **settings):
        raw = base()
        change(raw)
        return CocoDataset(rewrite(tmp_path / "one", raw), images, "set", **settings).digest

    original = digest()
    changes = [
        lambda raw: raw["annotations"][0].update(bbox=[5, 6, 10, 12]),
        lambda raw: raw["annotations"][0].update(area=7),
        lambda raw: raw["annotations"][0].update(iscrowd=1),
        lambda raw: raw["annotations"][0].update(category_id=3),
        lambda raw: raw["annotations"][0].update(image_id=42),
        lambda raw: raw["annotations"][0].update(id=99),
        lambda raw: raw["annotations"].pop(),
        lambda raw: raw["images"].pop(),
        lambda raw: raw["images"].reverse(),
        lambda raw: raw["categories"][0].update(name="cat"),
    ]
    assert len({original, *(digest(change) for change in changes)}) == 1 + len(changes)
    assert len({original, digest(invalid="drop"), digest(keep_empty=False)}) == 3
    assert original == digest(lambda raw: raw["annotations"][0].update(segmentation=[[1, 2, 3, 4]], note="x"))
    assert original == digest(lambda raw: raw.update(info={"year": 2026}, licenses=[]))
    rewrite(tmp_path / "one", base())
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    moved = CocoDataset(tmp_path / "two" / file.name, tmp_path / "two" / "images", "another name")
    assert moved.digest == original
    with open(tmp_path / "two/images/a.jpg", "ab") as stream:
        stream.write(b"\0")
    assert CocoDataset(tmp_path / "two" / file.name, tmp_path / "two" / "images", "set").digest != original


def test_other_pictures_of_equal_size_are_another_set(tmp_path):
    raw = base()
    for entry in raw["images"]:
        entry["file_name"] = f"{entry['id']}.bmp"
    file, images = write(tmp_path, raw)
    for entry in raw["images"]:
        Image.fromarray(picture(entry["height"], entry["width"])).save(images / entry["file_name"])
    before = CocoDataset(file, images, "set")
    assert before.hashed == "content"
    for path in images.glob("*.bmp"):
        stat, (width, height) = path.stat(), Image.open(path).size
        Image.new("RGB", (width, height)).save(path)
        assert path.stat().st_size == stat.st_size
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert CocoDataset(file, images, "set").digest != before.digest


def test_a_worker_process_gets_an_equal_data_set(tmp_path):
    data = CocoDataset(*write(tmp_path, base()), "set")
    other = pickle.loads(pickle.dumps(data))
    assert other.digest == data.digest and np.array_equal(other[0].image, data[0].image)


# --- configuration


def test_load_follows_the_configuration(config, tmp_path):
    root = write_splits(tmp_path / "ants", base(), base())
    train, val = load(config("data=coco", root, "data.keep_empty=false").data)
    assert (train.name, len(train), len(val)) == ("ants", 2, 3)  # evaluation keeps the image without objects
    assert load(config("data=coco", root, "data.label=my ants").data)[1].name == "my ants"
    with pytest.raises(UserError, match=r"data\.root=.*none is not a folder\. Fix"):
        load(config("data=coco", f"data.root={tmp_path / 'none'}").data)


CROWD = {"id": 1, "image_id": 7, "bbox": [1, 1, 5, 5], "area": 25, "iscrowd": 1}


@pytest.mark.parametrize("left", [[], [CROWD]])
def test_load_refuses_a_training_split_without_objects(config, tmp_path, left):
    data = base()
    category = {"category_id": data["categories"][0]["id"]}
    root = write_splits(tmp_path, data | {"annotations": [annotation | category for annotation in left]}, base())
    with pytest.raises(UserError, match=r"instances_train\.json .* has no object to learn from\. Fix"):
        load(config("data=coco", root).data)


@pytest.mark.parametrize("left", [[], [CROWD], [CROWD | {"iscrowd": 0, "ignore": 1}]])
def test_load_refuses_an_evaluation_split_without_objects(config, tmp_path, left):
    data = base()
    category = {"category_id": data["categories"][0]["id"]}
    root = write_splits(tmp_path, base(), data | {"annotations": [annotation | category for annotation in left]})
    cfg, message = config("data=coco", root), r"instances_val\.json .* has no object to evaluate\. Fix"
    for mode in ("train", "evaluate"):
        with pytest.raises(UserError, match=message):
            load_data(cfg.data, cfg.recipe, mode)
    (reason,) = splits_of(cfg)[1]
    assert re.search(message, reason)


def test_load_refuses_first_images_without_objects(config, tmp_path):
    data = base()
    data["annotations"] = [entry for entry in data["annotations"] if entry["image_id"] != data["images"][0]["id"]]
    root = write_splits(tmp_path, base(), data)
    cfg = config("data=coco", root, "recipe.eval_images=1")
    with pytest.raises(UserError, match=r"no object to evaluate in its first 1 images\. Fix: raise recipe\.eval_images"):
        load_data(cfg.data, cfg.recipe, "train")
    assert load_data(cfg.data, cfg.recipe.model_copy(update={"eval_images": 2}), "train")


# --- real sets


@pytest.mark.parametrize(
    "annotations, images, count",
    [
        ("bccd/annotations/instances_all.json", "bccd/images", 364),
        ("facemask/annotations/instances_all.json", "facemask/images", 853),
        ("coco_eval/voc100_gt.json", "coco_eval/voc100_images", 100),
    ],
)
def test_real_sets_load_with_the_default_setting(annotations, images, count):
    if not (REAL / annotations).exists():
        pytest.skip(f"{REAL / annotations} is not there")
    data = CocoDataset(REAL / annotations, REAL / images, "real")
    raw = json.loads((REAL / annotations).read_text())
    assert len(data) == count and data.repairs == {}
    for got, given in zip(by_id(data.coco()["annotations"]), by_id(raw["annotations"]), strict=True):
        assert got == {key: given[key] for key in got}
    for n in range(0, count, count // 7):
        one = data[n]
        height, width = one.image.shape[:2]
        expected = [a["bbox"] for a in raw["annotations"] if a["image_id"] == one.image_id]
        expected = np.array([[x, y, x + w, y + h] for x, y, w, h in expected]).reshape(-1, 4)
        np.testing.assert_allclose(one.boxes, expected.clip(0, [width, height] * 2), atol=1e-3)

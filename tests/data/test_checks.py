"""Faults of a COCO-format set: each is found, named and refused, and nothing else is."""

import json
import os
import subprocess

import numpy as np
import pytest
from coco_sets import REAL, base, picture, rewrite, write
from PIL import Image

from fpn_ablate.data.checks import examine
from fpn_ablate.data.checks.findings import BOX, BROKEN, KINDS, NOTE
from fpn_ablate.data.checks.images import read_rgb
from fpn_ablate.data.coco import CocoDataset
from fpn_ablate.utils.errors import UserError

A, B = "images/a.jpg", "images/sub/b.png"
JSON = "instances.json"


def change(what, n, **values):
    return lambda data: data[what][n].update(values)


def remove(what, n, key):
    return lambda data: data[what][n].pop(key)


def again(what, n, **values):
    return lambda data: data[what].append(data[what][n] | values)


# Faults of the annotation file: what to do to a sound set, and the one finding that must come of it.
FAULTS = [
    # change, kind, file, image id, annotation id, part of the value
    (again("images", 0, file_name="c.png", height=30, width=20), "duplicate-image-id", JSON, 42, None, "c.png"),
    (again("categories", 0, name="dog"), "duplicate-category-id", JSON, None, None, "dog"),
    (change("annotations", 1, category_id=2), "unknown-category", JSON, 42, 12, "2"),
    (change("annotations", 1, image_id=43), "unknown-image", JSON, 43, 12, "43"),
    (change("images", 0, file_name="../a.jpg"), "path-escape", JSON, 42, None, "../a.jpg"),
    (change("images", 0, file_name="sub/../a.jpg"), "path-escape", JSON, 42, None, ".."),
    (change("images", 0, file_name="..\\a.jpg"), "path-escape", JSON, 42, None, ".."),
    (change("images", 0, file_name="/etc/hostname"), "path-escape", JSON, 42, None, "/etc/hostname"),
    (change("images", 0, file_name="a\0.jpg"), "path-escape", JSON, 42, None, "x00"),
    (change("images", 0, file_name="no.jpg"), "image-missing", "images/no.jpg", 42, None, "no such"),
    (change("images", 0, file_name="sub"), "image-missing", "images/sub", 42, None, "no such"),
    (change("images", 1, width=49), "image-size", B, 7, None, "50x50, annotated as 49x50"),
    (change("annotations", 0, bbox=[5, 6, 10, 0]), "box-empty", B, 7, 11, "[5.0, 6.0, 10.0, 0.0]"),
    (change("annotations", 0, bbox=[5, 6, -10, 12]), "box-empty", B, 7, 11, "-10"),
    (change("annotations", 0, bbox=[45, 6, 6.5, 12]), "box-outside", B, 7, 11, "50x50"),
    (change("annotations", 0, bbox=[-1.5, 6, 10, 12]), "box-outside", B, 7, 11, "-1.5"),
    (change("annotations", 0, bbox=[5, -30, 10, 12]), "box-outside", B, 7, 11, "-30"),
    (change("annotations", 0, bbox=[5, 48, 10, 4]), "box-outside", B, 7, 11, "48"),
    (change("annotations", 0, bbox=[50, 6, 1, 12]), "box-outside", B, 7, 11, "50.0"),
    (change("annotations", 0, bbox=[1e308, 6, 1e308, 12]), "box-outside", B, 7, 11, "1e+308"),
    (change("annotations", 0, bbox=[5, 6, float("nan"), 12]), "non-finite", JSON, 7, 11, "nan"),
    (change("annotations", 0, bbox=[5, 6, 10**400, 12]), "wrong-type", JSON, 7, 11, "bbox[2]"),
    (change("annotations", 0, area=float("inf")), "non-finite", JSON, 7, 11, "area"),
    (change("annotations", 0, area=-1), "wrong-type", JSON, 7, 11, "area"),
    (change("annotations", 0, bbox=[5, 6, 10]), "wrong-type", JSON, 7, 11, "bbox"),
    (change("annotations", 0, bbox=[5, 6, "10", 12]), "wrong-type", JSON, 7, 11, "'10'"),
    (change("annotations", 0, bbox=[5, 6, True, 12]), "wrong-type", JSON, 7, 11, "True"),
    (change("annotations", 0, iscrowd=2), "wrong-type", JSON, 7, 11, "iscrowd"),
    (change("annotations", 0, id="011"), "wrong-type", JSON, 7, None, "'011'"),
    (change("annotations", 0, image_id=2**53 + 1), "wrong-type", JSON, 2**53 + 1, 11, "9007199254740992"),
    (change("annotations", 0, id=1.5), "wrong-type", JSON, 7, None, "1.5"),
    (change("annotations", 0, ignore="perhaps"), "wrong-type", JSON, 7, 11, "perhaps"),
    (change("images", 2, width=0), "wrong-type", JSON, 9, None, "width"),
    (change("categories", 0, name=None), "wrong-type", JSON, None, None, "name"),
    (remove("annotations", 0, "bbox"), "missing-key", JSON, 7, 11, "bbox"),
    (remove("annotations", 0, "category_id"), "missing-key", JSON, 7, 11, "category_id"),
    (remove("images", 2, "width"), "missing-key", JSON, 9, None, "width"),
    (change("annotations", 0, area=1.1e10), "wrong-type", JSON, 7, 11, "10000000000"),
    (change("categories", 0, name="a\ud800"), "wrong-type", JSON, None, None, "unicode string"),
    (change("images", 0, file_name="\udcff.jpg"), "wrong-type", JSON, 42, None, "unicode string"),
    (change("images", 0, file_name="."), "path-escape", JSON, 42, None, "'.'"),
    (lambda data: data["annotations"].append(5), "wrong-type", JSON, None, None, "5"),
    (lambda data: data["images"].append(["id"]), "wrong-type", JSON, None, None, "['id']"),
    (lambda data: data.pop("categories"), "structure", JSON, None, None, "categories"),
    (lambda data: data.update(annotations={}), "structure", JSON, None, None, "annotations"),
    (lambda data: data.update(images=[]), "structure", JSON, None, None, "empty"),
]


def assert_refused(root, file, images, kind, where, image_id, annotation_id, value):
    report = examine.examine(file, images)
    faults = report.at(BROKEN, BOX)
    first = next(f for f in faults if f.kind == kind)
    assert (first.file, first.image_id, first.annotation_id) == (str(root / where), image_id, annotation_id)
    assert value in first.value
    assert not report.sound
    with pytest.raises(UserError) as refusal:
        CocoDataset(file, images, "set")
    for part in (f"1 {kind}", str(root / where), value, KINDS[kind][1]):
        assert part in str(refusal.value)
    if image_id is not None:
        assert f"image id {image_id}" in str(refusal.value)
    if annotation_id is not None:
        assert f"annotation id {annotation_id}" in str(refusal.value)
    return faults


@pytest.mark.parametrize("spoil, kind, where, image_id, annotation_id, value", FAULTS)
def test_each_fault_of_the_file_is_named_alone(tmp_path, spoil, kind, where, image_id, annotation_id, value):
    data = base()
    spoil(data)
    file, images = write(tmp_path, data)
    faults = assert_refused(tmp_path, file, images, kind, where, image_id, annotation_id, value)
    assert [f.kind for f in faults] == [kind]


def test_a_sound_set_has_no_findings(tmp_path):
    report = examine.examine(*write(tmp_path, base()))
    assert report.findings == [] and report.sound


def test_all_problems_are_found_at_once(tmp_path):
    data = base()
    change("annotations", 0, bbox=[5, 6, 0, 5], area=float("nan"))(data)  # two faults in one entry
    change("annotations", 1, category_id=2, image_id=43)(data)
    change("annotations", 2, bbox=[49, 2, 30, 4])(data)
    change("annotations", 3, bbox=[70, 2, 30, 4])(data)
    change("images", 2, file_name="no.png")(data)
    file, images = write(tmp_path, data)
    (images / "a.jpg").write_bytes(b"")
    counts = examine.counts(examine.examine(file, images).at(BROKEN, BOX))
    expected = ("non-finite", "unknown-category", "unknown-image", "image-missing", "image-unreadable")
    assert counts == {**dict.fromkeys(expected, 1), "box-outside": 2}
    change("annotations", 0, bbox=[5, "6", 0, 5], area=float("nan"), iscrowd="no")(data)
    rewrite(tmp_path, data)
    assert examine.counts(examine.examine(file, images).findings)["wrong-type"] == 2


NOT_JSON = [b"", b"{", b'{"images": [}', "\ud800".encode("utf-16", "surrogatepass"), b"\xff\xfe\x00{", b"[" * 200_000]
CONTENTS = [(content, "annotations-not-json", "") for content in NOT_JSON]
CONTENTS += [(content, "structure", "top level") for content in (b"[]", b"3", b'"images"', b"null")]


@pytest.mark.parametrize("content, kind, value", CONTENTS, ids=range(len(CONTENTS)))
def test_a_file_that_cannot_be_parsed_is_refused(tmp_path, content, kind, value):
    file, images = write(tmp_path, base())
    file.write_bytes(content)
    assert_refused(tmp_path, file, images, kind, JSON, None, None, value)


def test_an_object_of_many_keys_takes_no_time_by_their_square(tmp_path):
    """One of 200,000 keys stands twice; comparing each with each would take minutes."""
    keys = ", ".join(f'"k{n}": 0' for n in range(200_000))
    file, images = write(tmp_path, json.dumps(base())[:-1] + f', "info": {{{keys}, "k199999": 1}}}}')
    (found,) = examine.examine(file, images).findings
    assert (found.kind, "'k199999' stands 2 times" in str(found)) == ("duplicate-key", True)


@pytest.mark.parametrize("key", ["bbox", "id", "segmentation"])
def test_a_key_that_stands_twice_is_refused(tmp_path, key):
    text = json.dumps(base() | {"annotations": [base()["annotations"][0] | {"segmentation": []}]})
    value = json.dumps(base()["annotations"][0].get(key, []))
    twice = f'"{key}": {value}, "{key}": {value}'
    file, images = write(tmp_path, text.replace(f'"{key}": {value}', twice))
    report = examine.examine(file, images)
    assert {"duplicate-key"} == set(examine.counts(report.findings)) and f"'{key}' stands 2 times" in str(report.findings[0])
    with pytest.raises(UserError, match="JSON readers would use the last value"):
        CocoDataset(file, images, "set")


@pytest.mark.parametrize("depth", range(900, 1000, 7))
def test_a_value_nested_almost_as_deep_as_python_goes_is_named(tmp_path, depth):
    file, images = write(tmp_path, json.dumps(base()).replace('"bee"', "[" * depth + "]" * depth))
    assert not examine.examine(file, images).sound


def test_a_drawing_is_no_picture_and_starts_no_program(tmp_path, monkeypatch):
    """Pillow gives PostScript to Ghostscript."""
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail(f"started: {a}"))
    file, images = write(tmp_path, base())
    Image.fromarray(picture(40, 60)).save(images / "a.jpg", "EPS")
    assert_refused(tmp_path, file, images, "image-unreadable", A, 42, None, "cannot identify")
    with pytest.raises(OSError, match="cannot identify"):
        read_rgb(str(images / "a.jpg"), 60, 40)


def test_a_pipe_is_not_waited_for(tmp_path):
    file, images = write(tmp_path, base())
    (images / "a.jpg").unlink()
    os.mkfifo(images / "a.jpg")
    assert_refused(tmp_path, file, images, "image-missing", A, 42, None, "no such file")


def test_missing_files(tmp_path):
    file, images = write(tmp_path, base())
    assert_refused(tmp_path, tmp_path / "no.json", images, "annotations-missing", "no.json", None, None, "")
    assert_refused(tmp_path, tmp_path, images, "annotations-missing", "", None, None, "irectory")
    assert_refused(tmp_path, file, tmp_path / "none", "images-missing", "none", None, None, "no such folder")


def test_a_link_out_of_the_folder_is_refused_and_one_inside_is_not(tmp_path):
    file, images = write(tmp_path, base())
    (images / "a.jpg").rename(tmp_path / "outside.jpg")
    (images / "a.jpg").symlink_to(tmp_path / "outside.jpg")
    assert_refused(tmp_path, file, images, "link-outside", JSON, 42, None, f"'a.jpg' is a link to {tmp_path / 'outside.jpg'}")
    assert examine.examine(file, images, links=True).sound
    assert np.array_equal(CocoDataset(file, images, "set", links=True)[0].image.shape, (40, 60, 3))
    (images / "a.jpg").unlink()
    (tmp_path / "outside.jpg").rename(images / "other.jpg")
    (images / "a.jpg").symlink_to(images / "other.jpg")
    (tmp_path / "linked").symlink_to(images)
    assert examine.examine(file, tmp_path / "linked").sound  # the folder itself may be a link


def test_a_link_to_nothing_names_its_target(tmp_path):
    file, images = write(tmp_path, base())
    (images / "a.jpg").unlink()
    (images / "a.jpg").symlink_to(tmp_path / "cache" / "1a2b")
    (finding,) = examine.examine(file, images, links=True).findings
    assert finding.kind == "image-missing" and f"a link to {tmp_path}/cache/1a2b (dvc pull" in finding.value


@pytest.mark.parametrize("name", ["/etc/hostname", "../a.jpg", "a/../../x.jpg", "."])
def test_links_let_no_name_leave_the_folder(tmp_path, name):
    data = base()
    change("images", 0, file_name=name)(data)
    assert examine.counts(examine.examine(*write(tmp_path, data), links=True).findings) == {"path-escape": 1}


MEANT = [  # file_name, what is said of it
    ("sub\\b.png", "`\\` separates no folders here; below IMAGES, 'sub/b.png' is there"),
    ("images\\sub\\b.png", "'sub/b.png' is there"),
    ("images/sub/b.png", "no such file, but it is there from ROOT on; below IMAGES, 'sub/b.png' is there"),
    ("/data/set/images/c.png", "'c.png' is there"),
    ("https://example.com/set/c.png", "'c.png' is there"),
    ("%63.png", "'c.png' is there"),
    ("sub/B.PNG", "'sub/b.png' is there"),
]


@pytest.mark.parametrize(("name", "said"), MEANT)
@pytest.mark.parametrize("alike", [True, False])
def test_a_name_in_another_spelling_is_refused_with_the_file_that_is_there(tmp_path, name, said, alike):
    data = base()
    for entry in data["images"][: 3 if alike else 1]:
        entry["file_name"] = name
    file, images = write(tmp_path, data)
    (finding,) = examine.examine(file, images).findings
    said = said.replace("IMAGES", str(images)).replace("ROOT", str(tmp_path)) if alike else said.split(", ")[-1].split("; ")[-1]
    assert said in finding.value and finding.level == BROKEN
    assert (finding.kind, finding.count) == ("file-names", 3) if alike else finding.kind in ("image-missing", "path-escape")
    assert len(str(finding).splitlines()) == 1


def test_a_sound_picture_above_the_limit_is_not_called_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    file, images = write(tmp_path, base())
    findings = examine.examine(file, images).findings
    assert {(f.kind, f.value) for f in findings[:1]} == {("image-too-large", "more than 2,000 pixels, annotated as 60x40")}
    assert "cut the picture into tiles" in str(findings[0]) and "replace the file" not in str(findings[0])


@pytest.mark.parametrize(("peak", "dark"), [(2**14 - 1, True), (2**16 - 1, False)])
def test_pictures_of_16_bits_that_use_a_quarter_of_them_are_told(tmp_path, peak, dark):
    data = base()
    for entry in data["images"]:
        entry["file_name"] = f"{entry['id']}.png"
    file, images = write(tmp_path, data)
    for entry in data["images"]:
        grey = np.full((entry["height"], entry["width"]), 3000, np.uint16)
        grey[0, 0] = peak
        Image.fromarray(grey).save(images / entry["file_name"])
    report = examine.examine(file, images)
    assert report.sound and [f.kind for f in report.findings] == ["image-dark"] * dark
    assert not dark or "the first 3 pictures of 16 bits have values up to 16383 of 65535" in report.findings[0].value


DAMAGES = [(A, slice(-cut), "image-truncated", "truncated") for cut in (1, 2, 100, 1000)]
DAMAGES += [(B, slice(-3000), "image-truncated", "")]
DAMAGES += [(A, content, "image-unreadable", "") for content in (b"", b"no image", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n")]


@pytest.mark.parametrize("picture_file, content, kind, value", DAMAGES, ids=range(len(DAMAGES)))
def test_a_damaged_picture_is_refused(tmp_path, picture_file, content, kind, value):
    file, images = write(tmp_path, base())
    target = tmp_path / picture_file
    target.write_bytes(target.read_bytes()[content] if isinstance(content, slice) else content)
    assert_refused(tmp_path, file, images, kind, picture_file, 42 if picture_file == A else 7, None, value)


@pytest.mark.parametrize("suffix", ["bmp", "gif", "webp", "tif"])
def test_truncated_picture_of_another_format(tmp_path, suffix):
    data = base()
    change("images", 0, file_name=f"a.{suffix}")(data)
    file, images = write(tmp_path, data)
    Image.fromarray(picture(40, 60)).save(images / f"a.{suffix}")
    assert examine.examine(file, images).sound
    whole = (images / f"a.{suffix}").read_bytes()
    (images / f"a.{suffix}").write_bytes(whole[: len(whole) // 2])
    counts = examine.counts(examine.examine(file, images).findings)
    assert counts in ({"image-truncated": 1}, {"image-unreadable": 1})


def test_bytes_after_the_end_are_harmless(tmp_path):
    file, images = write(tmp_path, base())
    for name in ("a.jpg", "sub/b.png"):
        with open(images / name, "ab") as stream:
            stream.write(bytes(3 * 4096))
    assert examine.examine(file, images).sound


def test_a_pixel_format_without_rgb(tmp_path):
    data = base()
    change("images", 0, file_name="a.tif")(data)
    file, images = write(tmp_path, data)
    Image.fromarray(np.zeros((40, 60), dtype=np.float32)).save(images / "a.tif")
    assert_refused(tmp_path, file, images, "image-mode", "images/a.tif", 42, None, "F")


def test_transposed_size_without_rotation_in_exif_is_a_mismatch(tmp_path):
    data = base()
    change("images", 0, height=60, width=40)(data)
    file, images = write(tmp_path, data)
    change("annotations", 1, bbox=[0, 0, 40, 40])(data)
    change("annotations", 3, bbox=[0, 0, 40, 40])(data)
    rewrite(tmp_path, data)
    assert_refused(tmp_path, file, images, "image-size", A, 42, None, "60x40, annotated as 40x60")


def test_notes_do_not_refuse(tmp_path):
    data = base()
    change("annotations", 0, id=0)(data)
    change("annotations", 2, bbox=[-1, 2, 3, 49])(data)
    del data["annotations"][1]["area"], data["annotations"][3]["area"]
    report = examine.examine(*write(tmp_path, data))
    assert report.sound
    assert {f.kind: (f.image_id, f.annotation_id) for f in report.at(NOTE)} == {
        "mended": (None, None),
        "box-rounded": (7, 13),
        "area-missing": (None, None),
    }


def test_images_of_lvis_are_found_by_the_end_of_their_address(tmp_path):
    data = base()
    data["images"][1] |= {"coco_url": "http://host/sub/b.png", "height": 50.0}
    del data["images"][1]["file_name"]
    report = examine.examine(*write(tmp_path, data))
    assert report.sound and report.annotations.file_names == ["a.jpg", "sub/b.png", "c.png"]
    assert report.annotations.changes == {
        "entries of `images` without `file_name`, read from the last two parts of `coco_url`": 1,
        "entries of `images` with whole numbers written as floats or text": 1,
    }
    data["images"][1]["coco_url"] = "http://host/../secret.png"
    assert examine.counts(examine.examine(rewrite(tmp_path, data), tmp_path / "images").at(BROKEN)) == {"path-escape": 1}
    data["images"][1]["coco_url"] = 5
    assert examine.counts(examine.examine(rewrite(tmp_path, data), tmp_path / "images").at(BROKEN))["missing-key"] == 1


def test_a_faulty_entry_is_known_to_those_that_refer_to_it(tmp_path):
    """Advice to remove the annotations of an image that is there would empty the file."""
    data = base()
    del data["images"][0]["file_name"]
    change("images", 1, height=0)(data)
    change("categories", 0, name=7)(data)
    findings = examine.examine(*write(tmp_path, data)).at(BROKEN, BOX)
    assert examine.counts(findings) == {"wrong-type": 2, "missing-key": 1}
    del data["images"][1]["id"]  # whose objects they are cannot be known
    findings = examine.examine(rewrite(tmp_path, data), tmp_path / "images").at(BROKEN, BOX)
    assert examine.counts(findings) == {"wrong-type": 2, "missing-key": 2}


def test_boxes_that_are_fractions_of_the_image_are_named_once(tmp_path):
    data = base()
    for entry in data["annotations"]:
        x, y, w, h = entry["bbox"]
        entry.update(bbox=[x / 60, y / 60, w / 60, 0.001], area=w * h / 3600)
    file, images = write(tmp_path, data)
    assert_refused(tmp_path, file, images, "boxes-normalised", JSON, None, None, "every box lies within 0..1")
    assert [finding.kind for finding in examine.examine(file, images).findings] == ["boxes-normalised"]
    change("annotations", 0, bbox=[-1e-9, 0.1, 1.0000001, 0.5])(data)  # an exporter's rounding
    assert "boxes-normalised" in examine.counts(examine.examine(rewrite(tmp_path, data), images).findings)
    change("annotations", 0, bbox=[5, 6, 10, 12])(data)  # one box in pixels: the others are small
    assert "boxes-normalised" not in examine.counts(examine.examine(rewrite(tmp_path, data), images).findings)


def test_refusal_shows_rare_kinds_before_many_of_one(tmp_path):
    data = base()
    data["annotations"] += [data["annotations"][0] | {"id": n, "bbox": [0, 0, 0, 5]} for n in range(100, 150)]
    change("annotations", 1, category_id=2)(data)
    change("annotations", 3, bbox=[0, 0, 70, 70])(data)
    with pytest.raises(UserError) as refusal:
        CocoDataset(*write(tmp_path, data), "set")
    text = str(refusal.value)
    assert "52 problems" in text and "50 box-empty" in text and "... and 42 more" in text
    assert all(KINDS[kind][1] in text for kind in ("box-empty", "unknown-category", "box-outside"))
    assert text.count("Fix:") == 10


@pytest.mark.parametrize("name", ["instances_val2014_100", "padilla_gts_nocrowd_bboxarea", "voc100_gt"])
def test_real_annotation_files_are_sound(name):
    file = REAL / "coco_eval" / f"{name}.json"
    if not file.exists():
        pytest.skip(f"{file} is not there")
    report = examine.examine(file)
    assert report.findings == []
    assert len(report.annotations.image_ids) == 100

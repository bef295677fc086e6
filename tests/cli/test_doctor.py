"""`python -m fpn_ablate doctor`: of a data set as a run would see it, and of one annotation file."""

import json
import shutil

import pytest
from coco_sets import base, rewrite, split, write, write_splits
from settings import ROWS

TRAIN = [(1, 1, [1, 2, 3, 4], 0), (1, 3, [0, 0, 60, 40], 0), (3, 3, [10, 10, 50, 100], 0)]
VAL = [(11, 3, [5, 6, 10, 12], 0)]
FEW = ("data.train_images=8", "data.val_images=8")  # rendering all that recipe=smoke has takes ten seconds


@pytest.fixture
def root(tmp_path):
    """A sound set, as data.root=..."""
    return write_splits(tmp_path, split(TRAIN), split(VAL, ("val/a.png",), first=11))


def test_the_facts_are_printed_and_written(cli, root, tmp_path):
    call = ["doctor", "data=coco", root, "recipe=smoke", "ablation=c4,fpn"]
    code, out, _ = cli(*call, "--json", "-")
    report = json.loads(out)
    assert code == 0 and list(report["anchors"]) == ["c4", "fpn"] and report["format"] == 1
    code, out, _ = cli(*call, "--json", tmp_path / "facts.json")
    assert code == 0 and json.loads((tmp_path / "facts.json").read_text()) == report
    assert "Sound." in out and "bee" in out and "\x1b" not in out and out.isascii() == ("√" not in out)


def test_names_of_categories_are_printed_as_they_stand(cli, root, tmp_path):
    """Neither control characters, as that which turns the direction of writing, nor rich's markup has an effect."""
    for file in tmp_path.rglob("instances_*.json"):
        file.write_text(file.read_text().replace('"bee"', r'"b\u202ee[red]"'))
    out = cli("doctor", "data=coco", root, "recipe=smoke", "ablation=c5")[1]
    assert r"b\u202ee[red]  " in out and "\u202e" not in out


def test_a_set_that_a_run_would_refuse_ends_with_code_1(cli, root, tmp_path):
    shutil.move(tmp_path / "images/c.png", tmp_path / "c.png")
    code, out, _ = cli("doctor", "data=coco", root, "recipe=smoke", "ablation=c5")
    assert code == 1
    _, _, end = out.partition("categories;")  # behind the tables, where the reason is in sight
    assert f"train, {tmp_path}/annotations/instances_train.json: Problems: 1 image-missing" in end
    assert end.endswith("A training would be refused.\n")


def test_retinanet_is_judged_by_its_own_anchors(cli):
    report = json.loads(cli("doctor", "recipe=smoke", *FEW, "ablation=retinanet/six_anchors", "--json", "-")[1])
    (row,) = report["anchors"].values()
    assert [level["stride"] for level in row["levels"]] == [8, 16, 32, 64, 128] and row["ratios"] == [0.5, 1, 2]
    assert row["levels"][0]["anchor_sizes"] == pytest.approx([32 * 64 / 800, 32 * 64 / 800 * 2**0.5])


@pytest.mark.parametrize("task", ["segment_proposals", "yolo"])
def test_a_task_without_anchors_is_not_judged_by_them(cli, task):
    report = json.loads(cli("doctor", "recipe=smoke", *FEW, f"task={task}", "--json", "-")[1])
    assert report["sound"] and not report["anchors"] and not any("anchor" in str(warning) for warning in report["warnings"])


@pytest.mark.parametrize(
    ("task", "rows"), [pytest.param("rpn", list(ROWS), marks=pytest.mark.slow), ("faster_rcnn", ["c4", "c5", "fpn"])]
)
def test_the_rows_are_those_of_the_tasks_table_and_ones_own(cli, root, mine, task, rows):
    call = ["doctor", "data=coco", root, "recipe=smoke", f"task={task}", "--json", "-"]
    assert list(json.loads(cli(*call)[1])["anchors"]) == rows
    assert list(json.loads(cli(*call, "--config-dir", mine)[1])["anchors"]) == [*rows, "mine"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data=coco", "data.root=nowhere"], "data.root=nowhere is not a folder"),
        (["recipe=smoke", "backbone.weights=none.pth"], "backbone.weights=none.pth: no such file"),
        (["recipe=smoke", "rpn.anchr_sizes=[8]"], "Did you mean rpn.anchor_sizes?"),
        (["data=voc"], "data/voc"),
        (["recipe=smoke", "--json", ""], "give the name of a file"),
        (["a.json", "images", "more"], "more: "),
        (["a.json", "--json", "-"], "--json goes with"),
        (["."], "data=coco data.root=."),
    ],
)
def test_bad_arguments_are_refused_with_the_fix(cli, arguments, message):
    code, out, err = cli("doctor", *arguments)
    assert (code, out) == (2, "")
    assert message in err and "Traceback" not in err


def test_one_annotation_file_is_examined_with_its_images_or_without(cli, tmp_path):
    data = base()
    file, images = write(tmp_path, data)
    code, out, _ = cli("doctor", file, images)
    assert code == 0 and "3 images, 4 objects, 3 categories" in out and out.endswith("Sound.\n")
    data["annotations"][1]["bbox"] = [0, 0, 0, 5]
    data["images"][0]["file_name"] = "no.jpg"
    rewrite(tmp_path, data)
    code, out, _ = cli("doctor", file, images)
    assert code == 1
    assert "1 image-missing, 1 box-empty" in out and "annotation id 12" in out
    code, out, _ = cli("doctor", file)
    assert code == 1 and "box-empty" in out and "image-missing" not in out

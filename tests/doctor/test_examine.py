"""What is found out of a data set: both splits, sizes, anchors, balance, duplicates."""

import hashlib
import json
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_sets import REAL, SIZES, split, write_splits
from settings import ROWS

from fpn_ablate.cli.doctor_text import show
from fpn_ablate.data import coco
from fpn_ablate.data.transforms import Resize, prepare
from fpn_ablate.doctor import facts, recall
from fpn_ablate.doctor.report import describe_data
from fpn_ablate.doctor.splits import splits_of
from fpn_ablate.model import anchors, boxes
from fpn_ablate.model.build import build_detector


@pytest.fixture
def make(tmp_path):
    """`make(train, val)` writes a set whose pictures all differ, and returns its root as data.root=..."""
    return partial(write_splits, tmp_path)


TRAIN = [(1, 1, [1, 2, 3, 4], 0), (1, 3, [0, 0, 60, 40], 0), (3, 3, [10, 10, 50, 100], 0), (3, 1, [0, 0, 90, 90], 1)]
VAL = [(11, 3, [5, 6, 10, 12], 0)]
ONE = ("val/a.png",)


def examined(config, *overrides, rows=("fpn",)):
    return describe_data({row: config("data=coco", f"ablation={row}", *overrides) for row in rows})


def kinds(report):
    return {(warning["kind"], warning["split"]) for warning in report["warnings"]}


def test_a_set_is_counted_by_split_size_and_category(config, make):
    root = make(split(TRAIN), split(VAL, ONE, first=11))
    report = examined(config, root, "recipe.short_side=64", "recipe.max_side=128")
    train, val = report["splits"]["train"], report["splits"]["val"]
    assert report["sound"] and not report["refused"]
    assert [train[key] for key in ("images", "images_used", "images_without_objects", "objects", "crowd")] == [3, 3, 1, 3, 1]
    assert train["objects_an_image"] == {"mean": 1.0, "median": 1.0, "max": 2, "above_100": 0}
    assert train["crowd_share"] == 0.25
    assert [train["sizes"]["native"][area] for area in ("small", "medium", "large")] == [1, 2, 0]
    # 1.6 and 64 / 90 times as large: 2400 px are 6144, 5000 are 2517.
    assert [train["sizes"]["input"][area] for area in ("small", "medium", "large")] == [1, 2, 0]
    assert train["sizes"]["input"]["sqrt_area"]["max"] == pytest.approx((2400 * 64 / 40 * 96 / 60) ** 0.5, abs=1e-3)
    assert train["sizes"]["aspect_ratio"]["max"] == 2
    assert train["categories"] == [
        {"id": 1, "name": "ant", "objects": 1, "images": 1},
        {"id": 3, "name": "bee", "objects": 2, "images": 2},
        {"id": 90, "name": "cow", "objects": 0, "images": 0},
    ]
    assert (train["imbalance"], val["imbalance"]) == (2, 1)
    assert {("category-without-objects", "train"), ("category-without-objects", "val")} <= kinds(report)
    assert not {kind for kind, _ in kinds(report)} - {"category-without-objects", "anchors"}


def test_empty_images_are_handed_out_as_the_run_says(config, make):
    root = make(split(TRAIN), split(VAL, (*ONE, "val/b.png"), first=11))
    report = examined(config, root, "data.keep_empty=false")
    assert [report["splits"][name]["images_used"] for name in ("train", "val")] == [2, 2]


def test_objects_below_a_pixel_and_below_a_cell_are_told(config, make):
    root = make(split([(3, 1, [0, 0, 0.5, 60], 0), (3, 1, [5, 5, 2, 2], 0), (3, 1, [5, 5, 9, 9], 0)]), split(VAL, ONE, 11))
    sizes = examined(config, root, "recipe.short_side=90", "recipe.max_side=128")["splits"]["train"]["sizes"]
    assert (sizes["below_one_pixel"], sizes["below_finest_stride"], sizes["finest_stride"]) == (1, 1, 4)
    assert examined(config, root, rows=("c5",))["splits"]["train"]["sizes"]["finest_stride"] == 32


def test_more_objects_than_an_evaluation_counts_are_told(config, make):
    many = [(11, 1, [1 + 0.1 * n, 2, 3, 4], 0) for n in range(101)]
    report = examined(config, make(split(TRAIN), split(many, ONE, 11)))
    assert report["splits"]["val"]["objects_an_image"]["above_100"] == 1
    assert ("crowded", "val") in kinds(report) and ("crowded", "train") not in kinds(report)


def test_duplicates_within_a_split_are_told(config, make):
    twice = [*TRAIN, (1, 3, [0, 0, 60, 40], 0), (1, 1, [0, 0, 60, 40], 0), (3, 1, [0, 0, 90, 90], 0)]
    report = examined(config, make(split(twice, (*SIZES, "a.png")), split(VAL, ONE, first=11)))
    found = report["splits"]["train"]["duplicates"]
    # Not another category, and not a crowd region and an object.
    assert found == {"annotations": 1, "annotation_ids": [5], "file_names": 1, "shared_file_names": ["a.png"]}
    assert {("duplicate-annotations", "train"), ("duplicate-file-names", "train")} <= kinds(report)


def test_images_in_both_splits_are_found_by_content_and_by_name(config, make, tmp_path, monkeypatch):
    folders = ("train2017", "val2017")
    root = make(split(TRAIN), split(VAL, ("a.png", "x_b.png"), first=11), folders)
    shutil.copy(tmp_path / "train2017/b.png", tmp_path / "val2017/x_b.png")
    read, digest = [], hashlib.file_digest
    monkeypatch.setattr(facts.hashlib, "file_digest", lambda file, name: read.append(file.name) or digest(file, name))
    report = examined(config, root, *(f"data.{name}.images={f}" for name, f in zip(("train", "val"), folders, strict=True)))
    assert report["shared_images"] == {
        "by_name_and_size": [{"file_name": "a.png", "train": 1, "val": 11}],
        "by_content": [{"train": 2, "val": 12}],
    }
    assert {("shared-content", None), ("shared-name", None)} <= kinds(report)
    # Files that are as long as none of the other split are not read.
    length = {path.stat().st_size for path in (tmp_path / "val2017").iterdir()}
    assert all(Path(path).stat().st_size in length for path in read)
    assert not any(path.endswith("train2017/c.png") for path in read)
    assert report["sound"]


def brute_force(objects, size, levels, settings):
    """Every anchor of the padded image against every object."""
    height, width = (-(-side // 32) * 32 for side in size)
    every = torch.cat(
        [
            anchors.grid(
                anchors.cell_anchors(sizes, settings[1]),
                (level.stride, level.stride),
                -(-height // level.stride),
                -(-width // level.stride),
            )
            for level, sizes in zip(levels, anchors.sizes_per_level(levels, settings[0]), strict=False)
        ]
    )
    return boxes.iou(objects, every).amax(1)


@pytest.mark.parametrize("row", ["c4", "c5", "fpn", "finest"])
@pytest.mark.parametrize("size", [(64, 96), (61, 130), (20, 33)])
def test_the_best_anchor_is_that_of_the_whole_grid(config, row, size):
    cfg, generator = config(f"ablation={row}", "recipe.short_side=256", "recipe.max_side=448"), torch.Generator().manual_seed(0)
    corners = torch.rand(600, 2, 2, generator=generator).sort(1).values * torch.tensor(size).flip(0)
    # Long and small ones too, on the border and with their centres halfway between cells.
    corners[:100, :, 0] = torch.tensor([0.0, size[1]])
    corners[100:200, 1] = corners[100:200, 0] + 2
    corners[200:300] = corners[200:300].round()
    objects = corners.reshape(-1, 4)
    anchor_set = recall.anchors_of(cfg)
    levels = build_detector(cfg, heads=()).neck.levels
    expected = brute_force(objects, size, levels, ([s * 256 / 800 for s in cfg.rpn.anchor_sizes], cfg.rpn.anchor_ratios))
    best = recall.best_iou(objects, torch.tensor([size]).expand(600, 2), anchor_set)
    torch.testing.assert_close(best, expected)


@torch.no_grad()
def test_the_anchors_of_an_image_pyramid_are_those_that_it_reads_at_all_scales(config):
    cfg, generator = config("ablation=image_pyramid", "recipe.short_side=256", "recipe.max_side=448"), torch.Generator()
    corners = torch.rand(200, 2, 2, generator=generator.manual_seed(0)).sort(1).values * torch.tensor([96, 64])
    objects, sizes, every = corners.reshape(-1, 4), torch.tensor([[64, 96]]), []
    model = build_detector(cfg).eval()
    for number, scale in enumerate(cfg.image_pyramid.scales):
        images, scaled_sizes, ratio = model.resize(torch.zeros(1, 3, 64, 96, dtype=torch.uint8), sizes, scale)
        _, _, of_scale = model.read_rpn(number, model.features(images, scaled_sizes))
        every += [x / ratio for x in of_scale]
    best = recall.best_iou(objects, sizes.expand(200, 2), recall.anchors_of(cfg))
    torch.testing.assert_close(best, boxes.iou(objects, torch.cat(every)).amax(1))


def test_boxes_and_sizes_of_the_input_are_those_of_a_training(config, make):
    objects = [(1, 1, [-0.5, 2, 7, 9], 0), (1, 3, [50, 0, 10.5, 40], 0), (2, 3, [10, 10, 31, 33], 0), (3, 1, [3, 5, 7, 11], 0)]
    cfg = config("data=coco", make(split(objects), split(VAL, ONE, first=11)))
    resize = Resize.of(cfg.recipe)
    train, _ = coco.load(cfg.data)
    items = [prepare(train[index], resize, flip=False) for index in range(len(train))]
    table = splits_of(cfg)[0][0].table
    sizes = recall.input_sizes(table.sizes, resize)
    assert [tuple(size) for size in sizes] == [item.image.shape[1:] for item in items]
    boxes_of_input = torch.from_numpy(facts.input_boxes(table, sizes))
    torch.testing.assert_close(boxes_of_input, torch.cat([item.boxes for item in items]))


def test_a_coarse_row_cannot_see_small_objects(config, make):
    tiny = [(11, 1, [13.0, 13.0, 6, 6], 0), (11, 3, [0, 0, 60, 40], 0)]
    report = examined(
        config, make(split(TRAIN), split(tiny, ONE, 11)), "recipe.short_side=96", "recipe.max_side=160", rows=ROWS
    )
    recalls = {row: entry["recall"] for row, entry in report["anchors"].items()}
    assert set(recalls) == set(ROWS)
    assert recalls["fpn"] == recalls["bottom_up"] == recalls["no_lateral"]
    assert recalls["c5"]["small"]["iou50"] == 0 < recalls["finest"]["small"]["iou50"]
    assert recalls["finest"]["all"]["mean_best_iou"] >= recalls["fpn"]["all"]["mean_best_iou"]
    assert recalls["c5"]["large"] == {"objects": 0, "iou50": None, "iou70": None, "mean_best_iou": None}
    assert any(re.search(r"\b0% of the \d+ small objects", w["text"]) and "c5" in w["text"] for w in report["warnings"])


BAD = [(1, 1, [1, 2, 3, 4], 0), (1, 3, [50, 0, 30, 40], 0), (1, 1, [5, 5, 0, 5], 0)]


@pytest.mark.parametrize(("invalid", "sound", "objects"), [("error", False, 1), ("clip", True, 2), ("drop", True, 1)])
def test_what_the_run_would_refuse_is_refused(config, make, invalid, sound, objects, capsys):
    cfg = config("data=coco", make(split(BAD), split(VAL, ONE, first=11)), f"data.invalid={invalid}")
    report = describe_data({"fpn": cfg})
    assert report["sound"] == sound
    assert report["splits"]["train"]["objects"] == objects
    assert {f["kind"]: f["refused"] for f in report["splits"]["train"]["findings"]} == {
        "box-outside": not sound,
        "box-empty": not sound,
    }
    if sound:
        assert report["splits"]["train"]["repairs"] == coco.load(cfg.data)[0].repairs
    else:
        with pytest.raises(coco.UserError):
            coco.load(cfg.data)
    assert not {("corners", "train")} & kinds(report)  # one box of two leaves its image
    show(report)
    out = capsys.readouterr().out
    assert ("A training would be refused." in out) != sound and ("Fix: correct the box" in out) != sound


@pytest.mark.parametrize("invalid", ["error", "clip", "drop"])
def test_boxes_that_are_corners_are_told(config, make, invalid):
    boxes = [(1, 1, [1, 2, 3, 4], 0), *((1, 1, [50 + n, 30, 63, 40], 0) for n in range(3))]
    cfg = config("data=coco", make(split(boxes), split(VAL, ONE, first=11)), f"data.invalid={invalid}")
    assert ("corners", "train") in kinds(describe_data({"fpn": cfg}))


def test_splits_that_do_not_fit_together_are_refused_as_in_a_run(config, make):
    val = split(VAL, ONE, first=11)
    val["categories"][0]["name"] = "wasp"
    cfg = config("data=coco", make(split(TRAIN), val))
    with pytest.raises(coco.UserError, match=r"different categories: .*wasp") as refused:
        coco.load(cfg.data)
    report = describe_data({"fpn": cfg})
    assert not report["sound"] and report["refused"] == [str(refused.value)]


@pytest.mark.parametrize("train", [{"images": []}, split([]), split([(5, 1, [1, 2, 3, 4], 0), (1, 2, [1, 2, 3, 4], 0)])])
def test_a_set_with_little_to_count_is_still_told_of(config, make, tmp_path, train, capsys):
    root = make(split(TRAIN), split(VAL, ONE, first=11))
    (tmp_path / "annotations/instances_train.json").write_text(json.dumps(train))
    report = examined(config, root)
    show(report)
    assert not report["sound"] and "A training would be refused." in capsys.readouterr().out
    json.dumps(report, allow_nan=False)


def test_boxes_that_are_fractions_are_no_small_objects(config, make, capsys):
    fractions = [(1, 1, [0.1, 0.2, 0.3, 0.4], 0), (2, 3, [0.5, 0.5, 0.25, 0.125], 0)]
    report = examined(config, make(split(fractions), split(VAL, ONE, first=11)))
    assert not report["sound"] and report["splits"]["train"]["sizes"] is None
    assert not {("below-one-pixel", "train"), ("below-finest-stride", "train")} & kinds(report)
    show(report)
    assert "every box lies within 0..1, as [0.1, 0.2, 0.3, 0.4]" in capsys.readouterr().out


def test_generated_pictures_are_examined_too(config, capsys):
    report = describe_data({"fpn": config("data.train_images=4", "data.val_images=3", "recipe=smoke")})
    assert report["sound"] and report["generated"] and report["shared_images"] is None
    assert report["splits"]["val"]["images"] == 3
    assert report["splits"]["train"]["sizes"]["native"]["bounds"][0] == pytest.approx((32 * 64 / 480) ** 2)
    show(report)
    told = capsys.readouterr().out
    assert "generated" in told and "download" not in told


def test_weights_that_are_yet_to_be_downloaded_are_told(config, monkeypatch, tmp_path):
    cfg = config("backbone=resnet18", "data.train_images=4", "data.val_images=3", "recipe=smoke")
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (warning,) = (w for w in describe_data({"fpn": cfg})["warnings"] if w["kind"] == "download")
    address = re.search(r"https://\S+\.pth", warning["text"])[0]
    (tmp_path / "hub/checkpoints" / Path(address).name).touch()
    assert ("download", None) not in kinds(describe_data({"fpn": cfg}))


def test_real_sets_are_counted_as_the_evaluation_counts_them(config):
    if not (REAL / "facemask").is_dir():
        pytest.skip(f"{REAL / 'facemask'} is not there")
    cfg = config("data=coco", f"data.root={REAL / 'facemask'}")
    entries = splits_of(cfg)[0][1]
    truth = json.loads((REAL / "facemask/annotations/instances_val.json").read_text())
    counts = facts.size_facts(entries.table, entries.table.sizes, entries.bounds, 4)["native"]
    areas = np.array([a["area"] for a in truth["annotations"] if not a["iscrowd"]])
    assert counts["small"] == (areas < 32**2).sum() and counts["large"] == (areas > 96**2).sum()

"""The figure of detections: what is drawn where, read from the figure; and what is refused."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.image import imread
from matplotlib.patches import PathPatch, Rectangle
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from settings import JOINT, TINY

from fpn_ablate.cli.main import main
from fpn_ablate.cli.shapes import main as export_shapes
from fpn_ablate.engine.evaluate import evaluate
from fpn_ablate.engine.inputs import load_data
from fpn_ablate.evaluation.coco import DetectionSet
from fpn_ablate.evaluation.display import MAX_PROPOSALS
from fpn_ablate.runs import run as running
from fpn_ablate.runs.draw import COLOURS, FinishedRun, draw
from fpn_ablate.store.layout import run_folder
from fpn_ablate.utils import rle

STEP = ("recipe.steps=1", "recipe.roi.steps=1", "recipe.batch_size=1", "recipe.schedule.warmup_steps=0")
DETECTIONS = (*JOINT, "task.roi.score_thresh=0.0")  # an untrained network is sure of nothing


@pytest.fixture(scope="module")
def folders(config, tmp_path_factory):
    """Folders of finished runs: detections, proposals, and detections on a set on disk."""
    root = tmp_path_factory.mktemp("pictures")
    export_shapes(["--export", str(root / "set"), "--train", "2", "--val", "3", "--size", "64"])
    for file in (root / "set").rglob("*.json"):  # it stands for photographs
        file.write_text(json.dumps(json.loads(file.read_text()) | {"info": {}}))
    without_data = [override for override in TINY if not override.startswith("data.")]
    tasks = {
        "joint": (*TINY, *DETECTIONS),
        "rpn": TINY,
        "coco": (*without_data, *DETECTIONS, "data=coco", f"data.root={root / 'set'}"),
    }
    folders = {}
    for name, overrides in tasks.items():
        cfg = config(*overrides, *STEP, "recipe.eval_images=5").model_copy(update={"out": str(root / "results")})
        folders[name] = run_folder(cfg, running.run(cfg)["fingerprint"])
    return folders


@pytest.fixture
def copy(folders, tmp_path):
    """`copy("joint")` -> a folder with the run's files, to be changed."""
    return lambda name: Path(shutil.copytree(folders[name], tmp_path / name))


def replace_detections(folder, **changes):
    """Replace arrays of detections.npz; None leaves one out."""
    arrays = {**vars(DetectionSet.load(folder / "detections.npz")), **changes}
    np.savez(folder / "detections.npz", **{k: v for k, v in arrays.items() if v is not None})


def replace_in_record(folder, **changes):
    path = folder / "record.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def grid(figure, columns):
    return np.array(figure.axes).reshape(-1, columns)


def drawn(axis):
    """Solid boxes of a panel as (x0, y0, x1, y1, colour), without the ground truth upon a run's picture."""
    boxes = [p for p in axis.patches if isinstance(p, Rectangle)]
    patches = [p for p in boxes if to_hex(p.get_edgecolor()) not in ("#000000", "#ffffff")]
    return [(*p.get_bbox().extents.tolist(), to_hex(p.get_edgecolor()).upper()) for p in patches]


def texts(axis):
    return [text.get_text() for text in axis.texts]


def complaint(capsys, *arguments):
    assert main(["pictures", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_one_line_an_image_and_one_column_a_run_after_the_truth(folders):
    run = FinishedRun.load(folders["joint"])
    axes = grid(draw([run, FinishedRun.load(folders["rpn"])], count=3), 3)
    assert [line[0].get_ylabel() for line in axes] == ["image 1", "image 3", "image 5"]
    titles = [axis.get_title() for axis in axes[0]]
    assert titles[0] == "ground truth"
    assert (
        titles[1].startswith("fpn\n") and f"AP {100 * run.record['metrics']['AP']:.1f}" in titles[1] and "seed 0" in titles[1]
    )
    assert "AR@1k" in titles[2]
    _, validation = load_data(run.cfg.data, run.cfg.recipe, run.cfg.mode)
    for line, index in zip(axes, (0, 2, 4), strict=True):
        sample = validation[index]
        names = [validation.categories[label - 1]["name"] for label in sample.labels]
        assert texts(line[0]) == names
        assert np.allclose([box[:4] for box in drawn(line[0])], sample.boxes)
        for axis in line:
            assert np.array_equal(axis.images[0].get_array(), sample.image)
        dashed = [p for p in line[1].patches if to_hex(p.get_edgecolor()) == "#ffffff"]
        assert np.allclose([p.get_bbox().extents for p in dashed], sample.boxes)
    assert len(grid(draw([run], count=99), 2)) == 5


def test_a_threshold_keeps_the_sure_and_the_best_ends_on_top(copy):
    folder = copy("joint")
    boxes = np.array([[1, 2, 30, 40], [5, 6, 20, 21], [2, 2, 9, 9], [8, 8, 30, 30]], np.float32)
    ids, scores = np.array([1, 1, 1, 2]), np.array([0.9, 0.5, 0.49, 0.99], np.float32)
    replace_detections(folder, image_ids=ids, boxes=boxes, scores=scores, labels=np.array([3, 1, 2, 2]))
    panel = grid(draw([FinishedRun.load(folder)], count=1), 2)[0, 1]
    assert texts(panel) == ["red 0.50", "blue 0.90"]
    assert drawn(panel) == [(5, 6, 20, 21, COLOURS[0]), (1, 2, 30, 40, COLOURS[2])]
    assert len(drawn(grid(draw([FinishedRun.load(folder)], count=1, threshold=0.4), 2)[0, 1])) == 3


def test_of_proposals_the_best_are_drawn_whatever_the_threshold(folders):
    run = FinishedRun.load(folders["rpn"])
    panel = grid(draw([run], count=1, threshold=1.0), 2)[0, 1]
    first = run.detections.image_ids == 1
    best = np.argsort(run.detections.scores[first], kind="stable")[-MAX_PROPOSALS:]
    assert np.allclose([box[:4] for box in drawn(panel)], run.detections.boxes[first][best])
    assert texts(panel) == []


def outlined(axis, edge=None):
    """Boxes around the outlines of masks in a panel, with their colour; all that are filled, or those with this colour."""
    patches = [p for p in axis.patches if isinstance(p, PathPatch)]
    selected = [p for p in patches if (p.get_fill() if edge is None else to_hex(p.get_edgecolor()) == edge)]
    return [(*p.get_path().get_extents().extents.round().tolist(), to_hex(p.get_edgecolor()).upper()) for p in selected]


def rectangles(boxes, size=(64, 64)):
    """Masks that fill boxes."""
    masks = np.zeros((len(boxes), *size), bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.astype(int), strict=True):
        mask[y0:y1, x0:x1] = True
    return rle.encode(masks)


def replace_masks(folder, boxes, **changes):
    masks, lengths = rle.join(rectangles(boxes))
    replace_detections(folder, boxes=boxes, masks=masks, mask_lengths=lengths, **changes)


def truth_of(folder):
    """The first sample of a run's data, and boxes around its masks, as outlines show them."""
    run = FinishedRun.load(folder)
    sample = load_data(run.cfg.data, run.cfg.recipe, run.cfg.mode)[1][0]
    x, y, w, h = rle.boxes(sample.masks, np.array([sample.image.shape[:2]] * len(sample.masks))).T
    return sample, np.stack([x, y, x + w, y + h], 1)


def test_masks_are_drawn_with_the_boxes_of_detections_and_without_those_of_proposals(folders, copy):
    joint, rpn = copy("joint"), copy("rpn")
    boxes = np.array([[1, 2, 30, 40], [5, 6, 20, 21], [2, 2, 9, 9]], np.float32)
    ids, scores = np.array([1, 1, 1]), np.array([0.9, 0.6, 0.3], np.float32)
    replace_masks(joint, boxes, image_ids=ids, scores=scores, labels=np.array([3, 1, 2]))
    replace_in_record(joint, metrics={"AP": 0.5, "mask_AP": 0.25})
    sample, truth = truth_of(joint)
    # Proposals: objects, each shifted, and masks of better scores that find none of them.
    shifted = np.concatenate([np.clip(truth + np.array([1, 0, 1, 0]), 0, 64), np.tile([[0, 0, 1, 1]], (5, 1))]).astype(
        np.float32
    )
    replace_masks(rpn, shifted, image_ids=np.ones(len(shifted), int), scores=np.linspace(0, 1, len(shifted), dtype=np.float32))
    figure = draw([FinishedRun.load(folder) for folder in (joint, rpn, folders["joint"])], count=1)
    objects, detections, proposals, plain = grid(figure, 4)[0]
    colours = [COLOURS[label - 1] for label in sample.labels]
    assert outlined(objects) == [(*box, colour) for box, colour in zip(truth.tolist(), colours, strict=True)]
    expected = [(5, 6, 20, 21, COLOURS[0]), (1, 2, 30, 40, COLOURS[2])]
    assert outlined(detections) == drawn(detections) == expected
    assert {box[:4] for box in outlined(proposals)} <= {tuple(box) for box in shifted.tolist()}
    assert 0 < len(outlined(proposals)) <= len(truth) and not [p for p in proposals.patches if isinstance(p, Rectangle)]
    for panel in (detections, proposals):
        assert [box[:4] for box in outlined(panel, "#ffffff")] == [tuple(box) for box in truth.tolist()]
    assert outlined(plain) == outlined(plain, "#ffffff") == []
    assert "AP 50.0, mask AP 25.0" in detections.get_title()
    assert "match an object best" in figure.get_supxlabel()
    alone = draw([FinishedRun.load(folders["joint"])], count=1)
    assert outlined(alone.axes[0]) == [] and "mask" not in alone.get_supxlabel()


@pytest.mark.parametrize("masks", [False, True])
def test_results_of_a_run_are_read_by_cocos_api(copy, tmp_path, capsys, masks):
    folder = copy("joint")
    sample, truth = truth_of(folder)
    boxes, scores = truth.astype(np.float32), np.linspace(0.9, 0.5, len(truth), dtype=np.float32)
    boxes[1:] = np.clip(boxes[1:] + np.array([2, 0, 1, 0]), 0, 64)
    replace_masks(folder, boxes, image_ids=np.ones(len(boxes), int), scores=scores, labels=sample.labels)
    out = tmp_path / "results.json"
    assert main(["detections", str(folder), "--out", str(out), *["--masks"] * masks]) == 0
    assert f"{len(boxes)} {'masks' if masks else 'boxes'} written to {out}" in capsys.readouterr().out
    run = FinishedRun.load(folder)
    dataset = load_data(run.cfg.data, run.cfg.recipe, run.cfg.mode)[1]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = dataset.coco()
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(str(out)), "segm" if masks else "bbox")
        evaluation.params.areaRng[1:] = [[0, dataset.area_bounds[0]], list(dataset.area_bounds), [dataset.area_bounds[1], 1e10]]
        for step in (evaluation.evaluate, evaluation.accumulate, evaluation.summarize):
            step()
    recorded = evaluate(run.detections, dataset)["metrics"]
    names = [("mask_" if masks else "") + name for name in ("AP", "AP50", "AP75", "AP_s", "AP_m", "AP_l")]
    values = [-1 if recorded[name] is None else recorded[name] for name in names]
    assert values == pytest.approx(evaluation.stats[:6].tolist(), abs=1e-9) and 0 < values[0] < 1


def test_results_of_proposals_are_of_one_category_and_have_no_masks_without_masks(folders, tmp_path, capsys):
    out = tmp_path / "results.json"
    assert main(["detections", str(folders["rpn"]), "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    assert len(content) == len(FinishedRun.load(folders["rpn"]).detections.boxes) and {r["category_id"] for r in content} == {1}
    assert main(["detections", str(folders["rpn"]), "--out", str(out), "--masks"]) == 2
    assert "its detections have no masks; leave out --masks" in capsys.readouterr().err
    assert json.loads(out.read_text()) == content


def test_generated_data_are_marked_and_other_sets_named(folders):
    titles = [draw([FinishedRun.load(folders[name])], count=1).get_suptitle() for name in ("joint", "coco")]
    assert titles == ["GENERATED DATA", "set"]


def test_a_set_that_has_moved_is_found_with_root_and_its_names_are_drawn_as_they_are(folders, copy, tmp_path, capsys):
    folder, moved = copy("coco"), tmp_path / "moved"
    replace_in_record(folder, data_digest={})  # of an older run: other names are other data
    before = Path(FinishedRun.load(folder).cfg.data.root)
    shutil.copytree(before, moved)
    for file in moved.glob("annotations/*.json"):
        content = json.loads(file.read_text())
        for category in content["categories"]:
            category["name"] = "$\\frac{x}\n\x1b[2J$ " + "long" * 20
        file.write_text(json.dumps(content))
    out = tmp_path / "new" / "sheet.png"
    assert main(["pictures", str(folder), str(folder), "--root", str(moved), "--out", str(out), "--count", "2"]) == 0
    height, width, _ = imread(out).shape
    assert width > height > 500
    name = texts(draw([FinishedRun.load(folder, str(moved))], count=1).axes[0])[0]
    assert name.startswith("$\\frac{x}") and name.isprintable() and len(name) == 20
    assert "no such folder; give the data set's folder with --root PATH" in complaint(
        capsys, folder, "--root", tmp_path / "nowhere", "--out", out
    )
    assert "--root: " in complaint(capsys, folders["joint"], "--root", moved, "--out", out)


def test_runs_of_different_data_are_refused(folders, copy, tmp_path, capsys):
    out = ("--out", tmp_path / "a.png")
    assert "different data" in complaint(capsys, folders["joint"], folders["coco"], *out)
    folder = copy("joint")
    replace_in_record(folder, images={"count": 5, "declared": 5, "digest": "0" * 16})
    assert "different data" in complaint(capsys, folders["joint"], folder, *out)
    assert "not those on which" in complaint(capsys, folder, *out)
    assert not (tmp_path / "a.png").exists()


@pytest.fixture
def changed(folders, copy, tmp_path):
    """The run on a set on disk, copied with its set, and a function that changes a split: other objects or other pictures."""
    folder, data = copy("coco"), tmp_path / "set"
    shutil.copytree(FinishedRun.load(folder).cfg.data.root, data)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace(FinishedRun.load(folder).cfg.data.root, str(data)))

    def change(split, what):
        if what == "pictures":
            for picture in (data / "images" / split).iterdir():
                Image.new("RGB", Image.open(picture).size, (1, 2, 3)).save(picture)
        else:
            file = data / "annotations" / f"instances_{split}.json"
            content = json.loads(file.read_text())
            content["annotations"][0]["bbox"][2] -= 1
            file.write_text(json.dumps(content))

    return folder, data, change


@pytest.mark.parametrize("what", [pytest.param("pictures", marks=pytest.mark.slow), "annotations"])
def test_a_run_on_data_that_have_changed_since_is_refused(changed, what, tmp_path, capsys):
    folder, data, change = changed
    out = ("--out", str(tmp_path / "a.png"))
    assert main(["pictures", str(folder), *out]) == 0
    change("val", what)
    before = (folder / "record.json").read_text()
    words = f"{data / 'annotations' / 'instances_val.json'} or its pictures, the split 'val', have changed"
    assert words in complaint(capsys, folder, *out)
    for command in ("artifacts", "measure"):
        assert main([command, str(folder)]) == 2
        assert words in capsys.readouterr().err
    assert (folder / "record.json").read_text() == before
    replace_in_record(folder, data_digest={})  # an older record
    assert main(["pictures", str(folder), *out]) == 0


def test_pictures_read_the_evaluated_split_alone_and_the_others_both(changed, tmp_path, capsys):
    folder, _, change = changed
    change("train", "annotations")
    assert main(["pictures", str(folder), "--out", str(tmp_path / "a.png")]) == 0
    assert main(["measure", str(folder)]) == 2
    assert "instances_train.json or its pictures, the split 'train', have changed" in capsys.readouterr().err


def test_what_is_not_a_finished_run_is_refused(copy, tmp_path, capsys):
    out = ("--out", tmp_path / "a.png")
    assert "no readable record.json" in complaint(capsys, tmp_path / "nowhere", *out)
    folder = copy("joint")
    replace_in_record(folder, status="interrupted")
    assert "the run is interrupted, not finished" in complaint(capsys, folder, *out)
    replace_in_record(folder, status="finished")
    replace_detections(folder, labels=np.full(len(FinishedRun.load(folder).detections.boxes), 4))
    assert "detections of classes that shapes does not have" in complaint(capsys, folder, *out)
    replace_detections(folder, scores=np.zeros(1, np.float32))
    assert "cannot be read (scores holds float32 of shape (1,) for" in complaint(capsys, folder, *out)
    (folder / "detections.npz").write_bytes(b"PK\x03\x04cut off")
    assert "cannot be read" in complaint(capsys, folder, *out)


@pytest.mark.parametrize("option", [("--count", "0"), ("--threshold", "nan"), ("--out", "sheet.gif")])
def test_wrong_options_are_refused_before_anything_is_read(option, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["pictures", str(tmp_path), *option])
    assert option[0] in capsys.readouterr().err

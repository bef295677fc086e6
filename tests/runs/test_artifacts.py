"""Artifacts of a run: what the report shows beside the figures, and that the command makes it again."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from settings import JOINT, TINY

from fpn_ablate.cli.main import main
from fpn_ablate.engine.evaluate import ground_truth
from fpn_ablate.evaluation.bootstrap import bootstrap_indices, bootstrap_metrics
from fpn_ablate.evaluation.coco import DetectionSet, average_recall
from fpn_ablate.runs import artifacts, pyramid, restore
from fpn_ablate.runs import run as running
from fpn_ablate.runs.pyramid import inspect_pyramid
from fpn_ablate.store import record
from fpn_ablate.store.bootstrap_store import Replicates
from fpn_ablate.store.layout import run_folder
from fpn_ablate.structures.batch import Batch
from fpn_ablate.utils import rle
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.paths import ARTIFACTS, DETECTIONS, INSPECTED, PICTURES, RESAMPLED, TRUE_MASKS, TRUTH

THREE = (*TINY, "recipe.eval_images=3")
TASKS = {"rpn": [], "c4": ["ablation=c4"], "joint": [*JOINT, "recipe.roi.steps=2", "task.roi.score_thresh=0.0"]}


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """Task -> folder of its run, all below one `out`."""
    out, folders = str(tmp_path_factory.mktemp("results")), {}
    for name, task in TASKS.items():
        cfg = config(*THREE, *task).model_copy(update={"out": out})
        folders[name] = run_folder(cfg, running.run(cfg)["fingerprint"])
    return folders


def evaluated(folder):
    """Data, ground truth and detections of a finished run."""
    trained, cfg, _ = restore.restore(folder)
    data = trained.validation
    return data, ground_truth(data, cfg.recipe.eval_images), DetectionSet.load(folder / DETECTIONS)


@pytest.mark.parametrize("name", TASKS)
def test_replicates_are_of_the_saved_detections_on_draws_that_all_rows_share(finished, name):
    data, truth, detections = evaluated(finished[name])
    indices = bootstrap_indices(3, np.random.default_rng(int(data.digest[:16], 16)))
    expected = bootstrap_metrics(truth, detections, data.categories, data.area_bounds, indices)
    saved = Replicates.of_runs([("f", finished[name])])["f"]
    assert set(saved) == set(expected) == set(record.read(finished[name])["metrics"])
    for metric, values in expected.items():
        np.testing.assert_allclose(saved[metric], values, atol=1e-5)


@pytest.mark.parametrize("name", TASKS)
def test_recall_by_size_puts_every_object_into_a_bin(finished, name):
    data, truth, detections = evaluated(finished[name])
    sizes = record.read(finished[name])["by_size"]
    assert sum(sizes["objects"]) == len(truth["annotations"])  # none lies exactly on an edge
    total = sum(n * (recall or 0.0) for n, recall in zip(sizes["objects"], sizes["AR100"], strict=True))
    # Bins ignore what lies outside, so that a box on a neighbour is no miss; the sum is near, not equal.
    assert total / sum(sizes["objects"]) == pytest.approx(average_recall(truth, detections)["AR100"], abs=0.05)
    bound = np.sqrt(data.area_bounds)
    assert np.isclose(np.array(sizes["edges"])[:, None], bound, atol=0.01).any(axis=0)[0]


def test_a_bin_is_the_evaluators_recall_in_that_range(finished):
    data, truth, detections = evaluated(finished["rpn"])
    edges = record.read(finished["rpn"])["by_size"]["edges"]
    sizes = artifacts.recall_by_size(truth, detections, data.area_bounds)
    k = int(np.argmax(sizes["objects"][1:-1])) + 1
    exact = average_recall(truth, detections, (edges[k - 1] ** 2, edges[k] ** 2))["AR100_m"]
    assert sizes["AR100"][k] == pytest.approx(exact, abs=0.02)  # edges are rounded for reading


@pytest.mark.parametrize("name", TASKS)
def test_levels_are_those_of_the_neck(finished, name):
    trained, cfg, device = restore.restore(finished[name])
    with np.load(finished[name] / ARTIFACTS) as content:
        saved = {key: content[key] for key in content.files if key.startswith(INSPECTED)}
        assert content["image_ids"].shape == content["values"].shape == (3,)
    levels = ["c4"] if name == "c4" else [f"p{k}" for k in range(2, 7)]
    kinds = ["level"] if name == "c4" else ["level", "added"]
    maps = {f"{kind}_{level}{end}" for kind in kinds for level in levels for end in ("", ".1", ".2")}
    assert set(saved) == maps | {"mapped_ids", "found_ids", "found_boxes", "found_levels", "found_names"}
    restored = inspect_pyramid(trained.model, trained.validation, cfg.recipe, device, 3)
    for key in maps:
        assert saved[key].dtype == np.uint8 and (saved[key].max() == 255 or key.startswith("added"))
        np.testing.assert_array_equal(saved[key], restored[key])
    assert saved["mapped_ids"].tolist() == [data.image_id for data in (trained.validation[n] for n in range(3))]


def test_the_top_down_path_adds_to_all_levels_but_the_coarsest(finished):
    with np.load(finished["rpn"] / ARTIFACTS) as content:
        added = {level: content[f"added_{level}"].max() for level in ("p2", "p3", "p4", "p5", "p6")}
    assert added["p2"] and added["p3"] and added["p4"]
    assert added["p5"] == added["p6"] == 0, "nothing comes down to C5's own level"


@pytest.mark.parametrize("name", TASKS)
def test_objects_are_looked_for_on_each_level(finished, name):
    _, truth, _ = evaluated(finished[name])
    with np.load(finished[name] / ARTIFACTS) as content:
        ids, boxes, levels = (content[f"found_{key}"] for key in ("ids", "boxes", "levels"))
    sizes = {image["id"]: (image["width"], image["height"]) for image in truth["images"]}
    expected = sorted((a["image_id"], *(round(side) for side in a["bbox"][:2])) for a in truth["annotations"])
    assert (
        sorted((i, round(x * sizes[i][0]), round(y * sizes[i][1])) for i, (x, y, *_) in zip(ids, boxes, strict=True))
        == expected
    )
    assert levels.min() >= -1 and levels.max() < (1 if name == "c4" else 5)


def test_the_level_is_that_of_the_best_score_of_those_that_overlap_enough():
    objects = torch.tensor([[[0.0, 0, 8, 8], [20, 20, 28, 28]]])
    batch = Batch(torch.zeros(1, 3, 32, 64), torch.tensor([[32, 64]]), objects, torch.ones(1, 2, dtype=torch.long),
                  torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2, dtype=torch.bool), [7])  # fmt: skip
    near, far = torch.tensor([[0.0, 0, 8, 7], [40, 0, 48, 8]]), torch.tensor([[0.0, 0, 8, 8], [0, 0, 30, 30]])
    levels = [(torch.tensor([0.9, 0.99]), near), (torch.tensor([0.8, 1.0]), far)]
    assert pyramid._found_on(levels, batch) == [(7, [0, 0, 0.125, 0.25], 0), (7, [0.3125, 0.625, 0.4375, 0.875], -1)]


def test_pictures_are_kept_once_for_all_rows_with_their_truth(finished):
    data, truth, _ = evaluated(finished["rpn"])
    names = {record.read(folder)["pictures"] for folder in finished.values()}
    assert len(names) == 1
    folder = finished["rpn"].parents[3] / PICTURES / names.pop()
    content = json.loads((folder / TRUTH).read_text())
    assert set(content["images"]) == {str(image["id"]) for image in truth["images"]}
    boxes = [entry["bbox"] for image in content["images"].values() for entry in image["objects"]]
    assert sorted(boxes) == sorted(annotation["bbox"] for annotation in truth["annotations"])
    sample = data[0]
    picture = np.asarray(Image.open(folder / f"{sample.image_id}.jpg"), dtype=float)
    assert picture.shape == sample.image.shape and abs(picture - sample.image).mean() < 15


def test_masks_of_the_truth_are_kept_for_a_run_with_masks(finished, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(finished["joint"].parents[4], out)
    folder = out / finished["joint"].relative_to(finished["joint"].parents[4])
    pictures = out / "runs" / PICTURES / record.read(folder)["pictures"]
    assert not (pictures / TRUE_MASKS).exists()
    _, truth, detections = evaluated(finished["joint"])
    whole = rle.encode(np.ones((1, *(truth["images"][0][side] for side in ("height", "width"))), bool))
    replace(detections, masks=whole * len(detections.boxes)).save(folder / DETECTIONS)
    assert main(["artifacts", str(folder)]) == 0
    saved, content = (json.loads((pictures / name).read_text()) for name in (TRUE_MASKS, TRUTH))
    assert [len(saved[key]) for key in content["images"]] == [len(image["objects"]) for image in content["images"].values()]
    masks = {(a["image_id"], tuple(a["bbox"])): a["segmentation"]["counts"] for a in truth["annotations"]}
    for key, image in content["images"].items():
        assert saved[key] == [masks[int(key), tuple(item["bbox"])] for item in image["objects"]]


def test_the_command_makes_all_of_it_again_and_nothing_else(finished, tmp_path, capsys):
    out = tmp_path / "copy"
    shutil.copytree(finished["joint"].parents[4], out)
    folders = [out / folder.relative_to(finished["joint"].parents[4]) for folder in finished.values()]
    files = [folder / name for folder in folders for name in (RESAMPLED, ARTIFACTS)]
    arrays = {path: dict(np.load(path)) for path in files}
    others = {path: path.read_bytes() for folder in folders for path in folder.iterdir() if path not in files}
    for path in files:
        path.unlink()
    for folder in folders:
        content = record.read(folder)
        record.write(folder, {key: value for key, value in content.items() if key not in ("by_size", "pictures")})
    shutil.rmtree(out / "runs" / PICTURES)
    assert main(["artifacts", str(out / "runs"), str(folders[0])]) == 0
    for path, content in others.items():
        if path.suffix == ".json":
            assert json.loads(path.read_text()) == json.loads(content)
        else:
            assert path.read_bytes() == content
    for path, content in arrays.items():
        remade = dict(np.load(path))
        assert set(remade) == set(content)
        for name, values in content.items():
            np.testing.assert_array_equal(remade[name], values)
    assert (out / "runs" / PICTURES).is_dir()
    assert capsys.readouterr().out.count(": made") == 3  # although the first folder was given twice


def test_another_machine_makes_all_but_the_levels_and_keeps_these(finished, tmp_path, capsys):
    out = tmp_path / "copy"
    shutil.copytree(finished["rpn"].parents[4], out)
    folder = out / finished["rpn"].relative_to(finished["rpn"].parents[4])
    with np.load(folder / ARTIFACTS) as content:
        before = {name: content[name] for name in content.files}
    saved = record.read(folder)
    record.write(folder, saved | {"environment": saved["environment"] | {"device": "NVIDIA H200"}})
    (folder / RESAMPLED).unlink()
    assert main(["artifacts", str(folder)]) == 0
    assert (folder / RESAMPLED).exists() and "activation maps stay as they were" in capsys.readouterr().err
    with np.load(folder / ARTIFACTS) as content:
        assert set(content.files) == set(before)
        np.testing.assert_array_equal(content["level_p2"], before["level_p2"])


def save_arrays(ids, columns):
    return lambda path: np.savez(path, image_ids=ids, boxes=np.zeros((1, columns)), scores=[0.5])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:100]), ""),
        (save_arrays([1], 3), "boxes holds float64 of shape (1, 3)"),
        (save_arrays(["1"], 4), "image_ids holds <U1"),
        (lambda path: path.unlink(), ""),
    ],
)
def test_damaged_detections_are_named_and_change_nothing(finished, tmp_path, capsys, change, words):
    out = tmp_path / "copy"
    shutil.copytree(finished["rpn"].parents[4], out)
    folder = out / finished["rpn"].relative_to(finished["rpn"].parents[4])
    change(folder / DETECTIONS)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert main(["artifacts", str(folder)]) == 2
    assert f"{folder / DETECTIONS}: cannot be read ({words}" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_disk_that_takes_them_not_does_not_cost_the_run(config, tmp_path, monkeypatch, capsys):
    def full(*arguments, **named):
        raise UserError("resampled.npz: cannot be written (No space left on device)")

    monkeypatch.setattr(artifacts, "make_artifacts", full)
    cfg = config(*THREE, "seed=7").model_copy(update={"out": str(tmp_path)})
    outcome = running.run(cfg)
    assert outcome["status"] == "finished" and "by_size" not in outcome
    assert "python -m fpn_ablate artifacts" in capsys.readouterr().err


def test_nothing_to_do_is_bad_input(tmp_path, capsys):
    assert main(["artifacts", str(tmp_path)]) == 2
    assert "no record.json below" in capsys.readouterr().err

"""mode=evaluate: a detector from a file, and nothing trained."""

import numpy as np
import pytest

from fpn_ablate import run as running
from fpn_ablate import tasks
from fpn_ablate.__main__ import main as command
from fpn_ablate.errors import UserError
from fpn_ablate.metrics import Detections
from fpn_ablate.weights.__main__ import main as weights

TINY = (
    "backbone.weights=none",
    "backbone.freeze_at=0",
    "backbone.frozen_bn=false",
    "recipe.eval_images=3",
    "data.train_images=4",
)
JOINT = ("task=faster_rcnn", "task.training=joint", "task.roi.score_thresh=0.0", "recipe.box.steps=2")


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    """A finished end-to-end cell: what it was made of, its record, its folder."""
    out = tmp_path_factory.mktemp("results")
    cfg = config(*TINY, *JOINT).model_copy(update={"out": str(out)})
    outcome = running.run(cfg)
    return out, outcome, running.cell_folder(cfg, outcome["fingerprint"])


@pytest.fixture
def evaluated(config, trained, monkeypatch):
    """Evaluate a file on the same images: record and detections."""

    def evaluate(path, *overrides):
        monkeypatch.setattr(tasks, "train", None)  # is not called
        cfg = config(*TINY, JOINT[0], JOINT[2], "mode=evaluate", f"weights={path}", *overrides)
        cfg = cfg.model_copy(update={"out": str(trained[0])})
        outcome = running.run(cfg)
        return outcome, Detections.load(running.cell_folder(cfg, outcome["fingerprint"]) / "detections.npz")

    return evaluate


@pytest.mark.parametrize("kind", ["folder", "model.pt", "safetensors"])
def test_what_a_row_found_is_found_again_from_its_weights(trained, evaluated, tmp_path, kind):
    _, known, folder = trained
    path = {"folder": folder, "model.pt": folder / "model.pt", "safetensors": tmp_path / "row.safetensors"}[kind]
    if kind == "safetensors":
        assert weights(["export", str(folder), str(path), "--to", "safetensors"]) == 0
    outcome, found = evaluated(path)
    assert outcome["metrics"] == known["metrics"] and outcome["per_class"] == known["per_class"]
    before = Detections.load(folder / "detections.npz")
    for name in ("image_ids", "boxes", "scores", "labels"):
        np.testing.assert_array_equal(getattr(found, name), getattr(before, name))


def test_the_record_names_the_file_and_stands_in_a_table_of_its_own(trained, evaluated):
    outcome, _ = evaluated(trained[2])
    assert (outcome["table"], outcome["row"]) == ("evaluated_faster_rcnn", f"fpn+weights={trained[2].name}")
    assert outcome["config"]["weights"] == trained[2].name and outcome["cost"]["steps"] == 0
    assert outcome["setting"] != trained[1]["setting"]


def test_two_files_are_two_rows_of_one_table_and_other_settings_another(trained, evaluated, tmp_path):
    (first, _), copy = evaluated(trained[2]), tmp_path / "copy.safetensors"
    assert weights(["export", str(trained[2]), str(copy), "--to", "safetensors"]) == 0
    (second, _), (third, _) = evaluated(copy), evaluated(copy, "recipe.eval_images=2")
    assert first["setting"] == second["setting"] != third["setting"]
    assert len({outcome["fingerprint"] for outcome in (first, second, third)}) == 3


def test_a_file_that_does_not_fit_is_refused(trained, evaluated):
    with pytest.raises(UserError, match="does not fit the network"):
        evaluated(trained[2], "ablation=c5")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["mode=evaluate"], "mode=evaluate needs weights="),
        (["weights=x.pt"], "backbone.weights=FILE"),
        (["mode=evaluate", "weights=nowhere.pt"], "nowhere.pt: no such file"),
        (["mode=evaluate", "weights=nowhere.pt", "task=fast_rcnn"], "task.proposals.file=FILE"),
    ],
)
def test_what_is_missing_is_named(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        raise SystemExit(command(["recipe=smoke", *arguments]))
    assert words in capsys.readouterr().err

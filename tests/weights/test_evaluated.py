"""mode=evaluate: evaluate a detector from a file, without training."""

import copy

import numpy as np
import pytest
import torch

from fpn_ablate.cli.main import main
from fpn_ablate.engine import procedures
from fpn_ablate.engine.inputs import prepare
from fpn_ablate.evaluation.coco import DetectionSet
from fpn_ablate.model.build import build_detector
from fpn_ablate.runs import run as running
from fpn_ablate.runs.restore import load_finished
from fpn_ablate.store.layout import run_folder
from fpn_ablate.utils.errors import UserError
from fpn_ablate.weights.evaluated import read_evaluated
from fpn_ablate.weights.files import inference_settings

TINY = (
    "backbone.weights=none",
    "backbone.freeze_at=0",
    "backbone.frozen_bn=false",
    "recipe.eval_images=3",
    "data.train_images=4",
)
JOINT = ("task=faster_rcnn", "task.training=joint", "task.roi.score_thresh=0.0", "recipe.roi.steps=2")


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    """Train an end-to-end run; return the folder of results, its record and its folder."""
    out = tmp_path_factory.mktemp("results")
    cfg = config(*TINY, *JOINT).model_copy(update={"out": str(out)})
    outcome = running.run(cfg)
    return out, outcome, run_folder(cfg, outcome["fingerprint"])


@pytest.fixture
def evaluated(config, trained, monkeypatch):
    """Evaluate a file on the same images: record and detections."""

    def evaluate(path, *overrides):
        monkeypatch.setattr(procedures, "train", None)  # is not called
        cfg = config(*TINY, JOINT[0], JOINT[2], "mode=evaluate", f"weights={path}", *overrides)
        cfg = cfg.model_copy(update={"out": str(trained[0])})
        outcome = running.run(cfg)
        return outcome, DetectionSet.load(run_folder(cfg, outcome["fingerprint"]) / "detections.npz")

    return evaluate


@pytest.mark.parametrize("kind", ["folder", "model.pt", "safetensors"])
def test_a_row_detects_the_same_from_its_weights(trained, evaluated, tmp_path, kind):
    _, record, folder = trained
    path = {"folder": folder, "model.pt": folder / "model.pt", "safetensors": tmp_path / "row.safetensors"}[kind]
    if kind == "safetensors":
        assert main(["weights", "export", str(folder), str(path), "--to", "safetensors"]) == 0
    outcome, detections = evaluated(path)
    assert outcome["metrics"] == record["metrics"] and outcome["per_class"] == record["per_class"]
    before = DetectionSet.load(folder / "detections.npz")
    for name in ("image_ids", "boxes", "scores", "labels"):
        np.testing.assert_array_equal(getattr(detections, name), getattr(before, name))


def test_the_record_names_the_file_and_stands_in_a_table_of_its_own(trained, evaluated):
    outcome, _ = evaluated(trained[2])
    assert (outcome["table"], outcome["row"]) == ("evaluated_faster_rcnn", f"fpn+weights={trained[2].name}")
    assert outcome["config"]["weights"] == trained[2].name and outcome["cost"]["steps"] == 0
    assert outcome["setting"] != trained[1]["setting"]


def test_two_files_are_two_rows_of_one_table_and_other_settings_another(trained, evaluated, tmp_path):
    (first, _), copy = evaluated(trained[2]), tmp_path / "copy.safetensors"
    assert main(["weights", "export", str(trained[2]), str(copy), "--to", "safetensors"]) == 0
    (second, _), (third, _) = evaluated(copy), evaluated(copy, "recipe.eval_images=2")
    assert first["setting"] == second["setting"] != third["setting"]
    assert len({outcome["fingerprint"] for outcome in (first, second, third)}) == 3


def test_a_file_that_does_not_fit_is_refused_and_leaves_no_record(trained, evaluated):
    before = set(trained[0].rglob("record.json"))
    with pytest.raises(UserError, match="does not fit the network"):
        evaluated(trained[2], "ablation=c5")
    assert set(trained[0].rglob("record.json")) == before


def test_settings_other_than_in_training_give_a_warning(trained, evaluated, capsys):
    assert "neck.upsample_init" not in inference_settings({"task": {}, "neck": {"upsample_init": "random"}})
    evaluated(trained[2])
    assert "WARNING" not in capsys.readouterr().err
    evaluated(trained[2], "neck.upsample=bilinear")
    assert 'WARNING: it was trained with neck.upsample="nearest" and is evaluated with "bilinear"' in capsys.readouterr().err


def test_settings_are_those_that_the_weights_do_not_reveal(config):
    of = [inference_settings(config(*overrides).model_dump(mode="json")) for overrides in (JOINT, ["task=retinanet"])]
    assert {"rpn.relu", "task.roi.levels", "neck.fuse"} <= set(of[0])
    assert "task.loss" not in of[1]  # a detector that was trained with another loss detects the same


def test_other_classes_are_refused_by_name(config, trained):
    cfg = config(*TINY, JOINT[0], "mode=evaluate", f"weights={trained[2]}")
    data = prepare(cfg).validation
    other = copy.copy(data)
    other.categories = [*data.categories[:-1], {"id": 99, "name": "bicycle"}]
    model = build_detector(cfg, num_classes=len(data.categories))
    with pytest.raises(UserError, match=r"has other classes than shapes; the difference: .*'bicycle'"):
        read_evaluated(trained[2], model, other, {})


def test_a_detector_whose_rpn_is_another_run_is_refused(config, trained, tmp_path):
    """model.pt of task=fast_rcnn, or of task.training=separate, has no RPN."""
    folder = tmp_path / "seed0"
    folder.mkdir()
    weights = torch.load(trained[2] / "model.pt")
    torch.save({name: value for name, value in weights.items() if not name.startswith("rpn.")}, folder / "model.pt")
    (folder / "config.yaml").write_text((trained[2] / "config.yaml").read_text())
    cfg = config(*TINY, JOINT[0], "mode=evaluate", f"weights={folder}")
    with pytest.raises(UserError, match="its RPN was trained in another run"):
        prepare(cfg)


def test_the_training_split_is_not_needed(config, trained, tmp_path):
    assert main(["shapes", "--export", str(tmp_path), "--train", "2", "--val", "3", "--size", "64"]) == 0
    (tmp_path / "annotations" / "instances_train.json").unlink()
    settings = ("data=coco", f"data.root={tmp_path}", "mode=evaluate", f"weights={trained[2]}")
    cfg = config("recipe=smoke", *TINY[:3], JOINT[0], *settings).model_copy(update={"out": str(tmp_path / "out")})
    assert running.run(cfg)["images"]["count"] == 3


def test_runs_whose_files_have_one_name_are_rows_of_their_own(config):
    rows = {
        config("mode=evaluate", f"weights={path}").row for path in ("a/seed0-1/model.pt", "b/seed0-2/model.pt", "b/seed0-2/")
    }
    assert rows == {"fpn+weights=seed0-1", "fpn+weights=seed0-2"}


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["mode=evaluate"], "mode=evaluate needs weights="),
        (["mode=evaluate", "weights=x.pt", "seed=3"], "one detector is one result: set seed=0"),
        (["weights=x.pt"], "backbone.weights=FILE"),
        (["mode=evaluate", "weights=nowhere.pt"], "nowhere.pt: no such file"),
        (["mode=evaluate", "weights=nowhere.pt", "task=fast_rcnn"], "task.proposals.file=FILE"),
    ],
)
def test_missing_settings_are_named(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        raise SystemExit(main(["recipe=smoke", *arguments]))
    assert words in capsys.readouterr().err


def test_files_that_would_be_one_row_are_refused_before_anything_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        raise SystemExit(main(["-m", "recipe=smoke", "jobs=1", "mode=evaluate", "weights=a/model.pth,b/model.pth"]))
    assert "give one of them another name" in capsys.readouterr().err
    assert not list(tmp_path.rglob("record.json"))


def test_a_setting_that_an_older_run_lacks_gives_no_warning(trained, evaluated, tmp_path, capsys):
    folder = tmp_path / "seed0"
    folder.mkdir()
    (folder / "model.pt").write_bytes((trained[2] / "model.pt").read_bytes())
    text = (trained[2] / "config.yaml").read_text()
    assert "anchor_grid: exact\n" in text
    (folder / "config.yaml").write_text("\n".join(line for line in text.splitlines() if "anchor_grid" not in line))
    evaluated(folder)
    assert "WARNING" not in capsys.readouterr().err


def test_a_trained_run_keeps_its_training_split_after_an_evaluated_one_was_read(trained, evaluated):
    evaluated(trained[2])
    folder = next((trained[0] / "runs" / "evaluated_faster_rcnn").glob(f"*/fpn+weights-{trained[2].name}/*"))
    _, _, (first, second) = load_finished(folder)
    assert first is second
    _, _, (training, validation) = load_finished(trained[2])
    assert training.digest != validation.digest

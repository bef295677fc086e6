"""Weights of mask branches: torchvision's and detectron2's come in, ours go out, a network without masks leaves them out."""

import re

import pytest
import torch
import yaml
from networks import load, randomise
from settings import SCRATCH
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from fpn_ablate.cli.main import main
from fpn_ablate.utils.errors import UserError
from fpn_ablate.weights.convert import COCO_UNUSED, convert
from fpn_ablate.weights.files import Stored, inference_settings
from fpn_ablate.weights.names import DETECTRON2, to_ours

KEYS = ("backbone=resnet18", *SCRATCH, "neck.channels=256", "task.roi.fc_dim=16")
MASKS = ("task=mask_rcnn", "task.training=joint", *KEYS, "task.mask.channels=8")
LOGITS = "roi_heads.mask_predictor.mask_fcn_logits"


def their_network(classes=3):
    return MaskRCNN(
        resnet_fpn_backbone(backbone_name="resnet18", weights=None),
        box_head=TwoMLPHead(256 * 49, 16),
        box_predictor=FastRCNNPredictor(16, classes + 1),
        mask_head=MaskRCNNHeads(256, (8,) * 4, 1),
        mask_predictor=MaskRCNNPredictor(8, 8, classes + 1),
    )


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A file of torchvision's Mask R-CNN, and its state dict."""
    path, state = tmp_path_factory.mktemp("torchvision") / "masks.pth", randomise(their_network()).state_dict()
    torch.save(state, path)
    return path, state


def test_torchvisions_masks_come_in_without_that_of_background(theirs, ours):
    path, state = theirs
    model = ours(3, *MASKS)
    assert not [note for note in load(model, path) if "left out" in note]
    head = model.roi.mask.head
    assert torch.equal(head.logits.weight, state[f"{LOGITS}.weight"][1:]) and torch.equal(
        head.logits.bias, state[f"{LOGITS}.bias"][1:]
    )
    assert torch.equal(head.convs[3].weight, state["roi_heads.mask_head.3.0.weight"])
    assert torch.equal(head.deconv.weight, state["roi_heads.mask_predictor.conv5_mask.weight"])


def test_a_network_of_boxes_leaves_masks_out_and_says_so(theirs, ours):
    path, state = theirs
    for keys in (("task=faster_rcnn", "task.training=joint", *KEYS), (*MASKS[:-1], "task.mask=null")):
        model = ours(3, *keys)
        assert [note for note in load(model, path) if "left out" in note] == [
            "left out: roi.mask.*, which this network does not have"
        ]
        assert torch.equal(model.roi.predictor.scores.weight, state["roi_heads.box_predictor.cls_score.weight"])


def test_a_network_with_masks_refuses_a_file_without(torchvision_file, ours):
    with pytest.raises(UserError, match=r"12 tensors are missing \(roi.mask.head.convs.0.weight"):
        load(ours(3, *MASKS), torchvision_file[0])


def test_the_names_before_torchvision_0_14_and_detectron2s_are_the_same_layers(theirs):
    path, state = theirs
    older = {
        re.sub(r"mask_head\.(\d)\.0", lambda m: f"mask_head.mask_fcn{int(m[1]) + 1}", name): x for name, x in state.items()
    }
    new, old = (convert(Stored(path, tensors)).tensors for tensors in (state, older))
    assert older.keys() != state.keys() and new.keys() == old.keys()
    names = [f"roi_heads.mask_head.{layer}.weight" for layer in ("mask_fcn1", "mask_fcn4", "deconv", "predictor")]
    assert [to_ours(DETECTRON2, name) for name in names] == [
        f"roi.mask.head.{layer}.weight" for layer in ("convs.0", "convs.3", "deconv", "logits")
    ]


def test_of_91_masks_those_of_cocos_80_categories_are_kept(theirs):
    path, state = theirs[0], dict(theirs[1])
    for layer, rows in (
        ("box_predictor.cls_score", 91),
        ("box_predictor.bbox_pred", 364),
        ("mask_predictor.mask_fcn_logits", 91),
    ):
        for leaf in ("weight", "bias"):
            value = state[f"roi_heads.{layer}.{leaf}"]
            state[f"roi_heads.{layer}.{leaf}"] = torch.arange(rows).view(-1, *[1] * (value.dim() - 1)) + torch.zeros(
                value.shape[1:]
            )
    masks = convert(Stored(path, state)).tensors["roi.mask.head.logits.weight"][:, 0, 0, 0]
    assert masks.tolist() == [number for number in range(1, 91) if number not in COCO_UNUSED]


@pytest.mark.parametrize("value", [torch.zeros(2, 8, 1, 1), torch.tensor(1.0)])
def test_masks_of_other_classes_than_the_scores_are_refused(theirs, value):
    with pytest.raises(UserError, match=r"its masks are of .* classes, and its scores of 4"):
        convert(Stored(theirs[0], theirs[1] | {f"{LOGITS}.weight": value}))


@pytest.fixture
def run(config, ours, tmp_path):
    """`run("task.mask.head=mlp")` -> the folder of a finished run with random weights."""

    def make(*more):
        (tmp_path / "run").mkdir()
        torch.save(ours(3, *MASKS, *more).state_dict(), tmp_path / "run" / "model.pt")
        (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config(*MASKS, *more).model_dump(mode="json")))
        return tmp_path / "run"

    return make


def test_a_run_goes_out_to_torchvision_and_comes_back(run, ours, tmp_path, capsys):
    folder, out = run(), tmp_path / "out.pth"
    assert main(["weights", "export", str(folder), str(out), "--to", "torchvision"]) == 0
    said = capsys.readouterr().out
    assert "for MaskRCNN(" in said and "box deltas and masks of background" in said
    network = their_network()
    network.load_state_dict(torch.load(out, weights_only=True), strict=True)
    assert not network.roi_heads.mask_predictor.mask_fcn_logits.weight[0].any()
    model, state = ours(3, *MASKS, seed=2), torch.load(folder / "model.pt")
    load(model, out)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items() if value.dim())


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("task.mask.class_agnostic=true", "torchvision has a mask for each class: task.mask.class_agnostic=false"),
        ("task.mask.head=mlp", "roi.mask.head.fc1.weight has no counterpart in torchvision's detector"),
    ],
)
def test_masks_that_torchvision_does_not_have_are_not_exported(run, tmp_path, capsys, key, message):
    with pytest.raises(SystemExit):
        raise SystemExit(main(["weights", "export", str(run(key)), str(tmp_path / "out.pth"), "--to", "torchvision"]))
    assert message in capsys.readouterr().err


def test_the_resolution_of_masks_is_among_the_settings_that_are_compared(config):
    settings = inference_settings(config(*MASKS).model_dump(mode="json"))
    assert settings["task.mask.resolution"] == 14
    assert "task.mask.resolution" not in inference_settings(config(*MASKS[:-1], "task.mask=null").model_dump(mode="json"))

"""Files of torchvision's RetinaNet: every name, the rows of classes, the order of anchors, and what a user must set."""

import re
from pathlib import Path

import pytest
import torch
from torchvision.models import detection

from fpn_ablate.model.build import build_detector
from fpn_ablate.utils.errors import UserError
from fpn_ablate.weights import loading
from fpn_ablate.weights.convert import COCO_UNUSED, Options, convert
from fpn_ablate.weights.files import Stored
from fpn_ablate.weights.loading import fit_to_model, misfit
from fpn_ablate.weights.names import RETINANET

NETWORKS = {"retinanet_resnet50_fpn": "torchvision", "retinanet_resnet50_fpn_v2": "torchvision_v2"}
SCORES, DELTAS = "head.classification_head.cls_logits", "head.regression_head.bbox_reg"


def their_state(network="retinanet_resnet50_fpn"):
    with torch.device("meta"):
        return getattr(detection, network)(weights=None, weights_backbone=None).state_dict()


def small(classes, anchors=9):
    """A head whose rows say what they are: (ratio, scale, class) of scores, (ratio, scale, coordinate) of deltas."""
    rows = {SCORES: anchors * classes, DELTAS: anchors * 4}
    return {f"{name}.{leaf}": torch.arange(n).float() for name, n in rows.items() for leaf in ("weight", "bias")}


@pytest.mark.parametrize("network", NETWORKS)
def test_each_tensor_of_torchvisions_network_is_one_of_ours(config, network):
    cfg = config(f"ablation=retinanet/{NETWORKS[network]}", "recipe=torchvision")
    with torch.device("meta"):
        model = build_detector(cfg, num_classes=80)
    weights = convert(Stored(Path("net.pth"), their_state(network)))
    assert weights.source == RETINANET and not weights.unknown
    assert misfit(model.state_dict(), weights.tensors) is None
    assert weights.facts["num_classes"] == "80"
    second = network.endswith("v2")
    hint = f"neck.levels=p3-p7 neck.p6={'conv_c5' if second else 'conv'}{' task.norm=gn' if second else ''}"
    assert f"use it with ablation=retinanet/{NETWORKS[network]} ({hint})" in weights.notes


def test_names_before_torchvision_0_13_are_the_same_layers():
    state = their_state()
    older = {
        re.sub(r"(head\.\w+_head\.conv)\.(\d)\.0\.", lambda m: f"{m[1]}.{2 * int(m[2])}.", name): x for name, x in state.items()
    }
    older = {re.sub(r"((?:inner|layer)_blocks\.\d)\.0\.", r"\1.", name): x for name, x in older.items()}
    assert older.keys() != state.keys()
    new, old = (convert(Stored(Path("net.pth"), x)).tensors for x in (state, older))
    assert new.keys() == old.keys()


def test_rows_of_background_and_of_unused_numbers_go_and_anchors_are_ordered_by_size():
    tensors = convert(Stored(Path("net.pth"), small(5))).tensors
    # Theirs: ratio by ratio; the first of our anchors' second ratio is their fourth.
    expected = [(ratio * 3 + scale) * 5 + k for scale in range(3) for ratio in range(3) for k in range(1, 5)]
    assert tensors["head.scores.weight"].tolist() == expected
    assert tensors["head.deltas.bias"].tolist() == [
        (ratio * 3 + scale) * 4 + k for scale in range(3) for ratio in range(3) for k in range(4)
    ]
    kept = [k for k in range(1, 91) if k not in COCO_UNUSED]
    coco = convert(Stored(Path("net.pth"), small(91))).tensors["head.scores.bias"]
    assert len(kept) == 80 and coco[:80].tolist() == kept
    assert len(convert(Stored(Path("net.pth"), small(91)), Options(keep_classes=True)).tensors["head.scores.bias"]) == 9 * 90
    assert convert(Stored(Path("net.pth"), small(3, anchors=1))).tensors["head.scores.bias"].tolist() == [1, 2]


def test_a_head_of_other_rows_is_refused():
    state = small(5)
    state[f"{SCORES}.bias"] = torch.zeros(44)
    with pytest.raises(UserError, match=r"net.pth: its head has the wrong rows"):
        convert(Stored(Path("net.pth"), state))


def test_the_message_for_a_network_of_other_classes_names_both_numbers(config, monkeypatch):
    monkeypatch.setattr(loading, "read", lambda path: Stored(path, their_state()))
    with torch.device("meta"):
        model = build_detector(config("ablation=retinanet/torchvision", "recipe=torchvision"), num_classes=2)
    with pytest.raises(UserError, match="it has 80 classes, and the data have 2"):
        fit_to_model(model, Path("net.pth"))

"""Load weights of other programs into our network: the tensors, what they compute, and files that do not fit."""

import argparse
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from networks import load
from parts import backbone_config
from torch import nn
from torchvision.models import detection
from torchvision.ops import FrozenBatchNorm2d

from fpn_ablate.model.backbones.base import MEAN, STD
from fpn_ablate.model.backbones.torchvision import has_stride_in_1x1, stride_to_1x1
from fpn_ablate.model.build import build_backbone, build_detector
from fpn_ablate.utils.errors import UserError
from fpn_ablate.weights import loading
from fpn_ablate.weights.backbone import backbone_weights
from fpn_ablate.weights.convert import COCO_UNUSED, Options, backbone_part, convert, to_torchvision
from fpn_ablate.weights.files import Stored, read, write_safetensors
from fpn_ablate.weights.loading import backbone_of, fit_to_model, open_weights

JOINT = ("task=faster_rcnn", "task.training=joint", "backbone.weights=none", "backbone.freeze_at=0", "backbone.frozen_bn=false")
PYRAMID = (*JOINT, "neck.channels=256", "task.roi.fc_dim=16")
CAFFE = "backbone.stride_in_1x1=true"


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


# -------------------------------------------------------------------------------------------------------------- torchvision


def test_the_names_before_torchvision_0_13_are_the_same_network(torchvision_file):
    path, theirs = torchvision_file
    older = {re.sub(r"(_blocks\.\d)\.0|(rpn\.head\.conv)\.0\.0", r"\1\2", name): value for name, value in theirs.items()}
    assert older.keys() != theirs.keys() and len(older) == len(theirs)
    assert same(convert(Stored(path, older)).tensors, convert(Stored(path, theirs)).tensors)


def coco_detector(torchvision_file) -> dict:
    _, theirs = torchvision_file
    state, generator = dict(theirs), torch.Generator().manual_seed(5)
    for layer, rows in (("cls_score", 91), ("bbox_pred", 364)):
        for leaf, shape in (("weight", (rows, 16)), ("bias", (rows,))):
            state[f"roi_heads.box_predictor.{layer}.{leaf}"] = torch.rand(shape, generator=generator)
    return state


def test_the_80_categories_of_coco_are_chosen_from_91_rows(torchvision_file, ours, tmp_path):
    state, path = coco_detector(torchvision_file), tmp_path / "coco.pth"
    torch.save(state, path)
    numbers = [number for number in range(1, 91) if number not in COCO_UNUSED]
    assert len(numbers) == 80
    model = ours(80, "backbone=resnet18", *PYRAMID)
    notes = load(model, path)
    assert any("91 rows" in line and "12, 26, 29, 30, 45, 66, 68, 69, 71, 83" in line for line in notes)
    scores, deltas = (state[f"roi_heads.box_predictor.{layer}.weight"] for layer in ("cls_score", "bbox_pred"))
    assert torch.equal(model.roi.predictor.scores.weight[0], scores[0])
    for index, number in enumerate(numbers):
        assert torch.equal(model.roi.predictor.scores.weight[index + 1], scores[number])
        assert torch.equal(model.roi.predictor.deltas.weight[4 * index : 4 * index + 4], deltas[4 * number : 4 * number + 4])
    kept = open_weights(path, Options(keep_classes=True))
    assert kept.facts["num_classes"] == "90" and torch.equal(kept.tensors["roi.predictor.scores.weight"], scores)
    model = ours(90, "backbone=resnet18", *PYRAMID)
    load(model, path)
    assert torch.equal(model.roi.predictor.deltas.weight, deltas[4:])


def test_another_eps_moves_the_scales_so_that_batch_norm_computes_the_same(torchvision_file, tmp_path):
    """Dead channels of ImageNet's networks have variances far below ours of 1e-5."""
    state = torch.load(torchvision_file[0])
    layer = "backbone.body.layer1.0.bn1"
    state[f"{layer}.running_var"][:4] = torch.tensor([1e-14, 4e-13, 1e-12, 3e-9])
    path = tmp_path / "dead.pth"
    torch.save(state, path)
    moved, plain = (open_weights(path, options).tensors for options in (Options(bn_eps=0.0), Options()))
    assert moved.keys() == plain.keys()
    batch_norms = {name.removesuffix("running_var") for name in plain if name.endswith("running_var")}
    assert {n for n in plain if not torch.equal(moved[n], plain[n])} == {f"{n}weight" for n in batch_norms}
    for name in batch_norms:
        variance = plain[f"{name}running_var"]
        ours = moved[f"{name}weight"] * (variance + FrozenBatchNorm2d(1).eps).rsqrt()  # as it computes, in fp32
        assert torch.isfinite(ours).all()
        torch.testing.assert_close(ours, plain[f"{name}weight"] * variance.rsqrt(), rtol=1e-5, atol=0)


def test_our_own_detector_of_ninety_classes_is_loaded(ours, tmp_path):
    source, model = ours(90, "backbone=resnet18", *PYRAMID), ours(90, "backbone=resnet18", *PYRAMID)
    torch.save(source.state_dict(), tmp_path / "own.pt")
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    load(model, tmp_path / "own.pt")
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_a_backbone_is_exported_as_it_was_imported_but_for_its_classifier(name, tmp_path):
    state, path = getattr(torchvision.models, name)(weights=None).state_dict(), tmp_path / "backbone.pth"
    torch.save(state, path)
    weights = open_weights(path)
    left = ("fc.", "classifier.", "features.18.")
    assert same(to_torchvision(weights), {k: v for k, v in state.items() if not k.startswith(left)})


# --------------------------------------------------------------------------------------------------------------- detectron2


def block_of_detectron2(name: str) -> str:
    """Translate our "0.bn1.weight" to "0.conv1.norm.weight"."""
    name = name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
    for number in "123":
        name = name.replace(f".bn{number}.", f".conv{number}.norm.")
    return name


def detectron2_file(model, path, std: tuple[float, float, float], trunk: str):
    """Write `model` as a pickle like the model zoo's; `std` in BGR. Written independently of the converter."""
    out = {}
    for name, value in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        part, _, rest = name.partition(".")
        if name == "backbone.stages.stem.0.weight":
            per_colour = [std[2 - c] / (255 * STD[c]) for c in range(3)]
            weight = torch.stack([value[:, 2 - c].double() * per_colour[2 - c] for c in range(3)], 1)
            out[f"{trunk}stem.conv1.weight"] = weight.float()
        elif name.startswith("backbone.stages.stem.1."):
            out[f"{trunk}stem.conv1.norm.{name.rpartition('.')[2]}"] = value
        elif part == "backbone":
            _, stage, inner = rest.split(".", 2)
            out[f"{trunk}res{stage[1]}.{block_of_detectron2(inner)}"] = value
        elif part == "neck":
            kind, level, leaf = rest.split(".")
            out[f"backbone.fpn_{'lateral' if kind == 'lateral' else 'output'}{level[1]}.{leaf}"] = value
        elif part == "rpn":
            layer = {"conv": "conv", "objectness": "objectness_logits", "deltas": "anchor_deltas"}[rest.split(".")[1]]
            out[f"proposal_generator.rpn_head.{layer}.{rest.split('.')[2]}"] = value
        elif rest.startswith("box_head.stage."):
            out[f"roi_heads.res5.{block_of_detectron2(rest.removeprefix('box_head.stage.'))}"] = value
        elif rest.startswith("box_head."):
            out[f"roi_heads.box_head.{rest.removeprefix('box_head.').replace('fc6', 'fc1').replace('fc7', 'fc2')}"] = value
        elif rest.startswith("predictor.scores."):
            out[f"roi_heads.box_predictor.cls_score.{rest[17:]}"] = torch.cat([value[1:], value[:1]])
        else:
            out[f"roi_heads.box_predictor.bbox_pred.{rest.removeprefix('predictor.deltas.')}"] = value
    out["pixel_mean"], out["pixel_std"] = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    out["proposal_generator.anchor_generator.cell_anchors.0"] = torch.zeros(3, 4)
    arrays = {name: value.numpy() for name, value in out.items()}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}, 4))
    return out


@pytest.mark.parametrize(
    ("overrides", "trunk", "std"),
    [
        (("backbone=resnet50", CAFFE, *PYRAMID), "backbone.bottom_up.", (1.0, 1.0, 1.0)),
        (("backbone=resnet18", *PYRAMID), "backbone.bottom_up.", (57.375, 57.12, 58.395)),
        (("backbone=resnet18", "ablation=c4", *JOINT), "backbone.", (1.0, 1.0, 1.0)),
    ],
    ids=["fpn", "std", "c4"],
)
def test_a_detector_of_detectron2_computes_what_it_is_taken_from(ours, tmp_path, overrides, trunk, std):
    path = tmp_path / "model.pkl"
    source, model = (ours(3, *overrides, seed=seed) for seed in (1, 2))
    written = detectron2_file(source, path, std, trunk)
    images = torch.randint(0, 256, (1, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    sizes = torch.tensor([[64, 64]])
    # The file's first convolution on what detectron2 reads is ours on what we read.
    mean = 255 * torch.tensor(MEAN).flip(0)
    bgr = (images.flip(1) - mean[:, None, None]) / torch.tensor(std)[:, None, None]
    first = F.conv2d(bgr, written[f"{trunk}stem.conv1.weight"], stride=2, padding=3)
    torch.testing.assert_close(
        first, source.backbone.stages["stem"][0](source.backbone.normalise(images, sizes)), rtol=1e-4, atol=1e-5
    )
    notes = load(model, path, Options(pixel_std=std))
    for name, value in source.state_dict().items():
        if name == "backbone.stages.stem.0.weight":
            torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-6, atol=0)
        elif not name.endswith("num_batches_tracked"):
            assert torch.equal(model.state_dict()[name], value), name
    with torch.no_grad():
        expected, features = source.features(images, sizes), model.features(images, sizes)
    for level in expected:
        torch.testing.assert_close(features[level], expected[level], rtol=1e-5, atol=1e-5)
    assert any(f"stride_in_1x1={str(CAFFE in overrides).lower()} task.roi.pooling=align_v2" in line for line in notes)
    assert not any("WARNING" in line for line in notes)


@pytest.fixture(scope="module")
def resnet50():
    """Return the state dict of a ResNet-50 with at most 4 channels a layer."""
    with torch.device("meta"):
        state = torchvision.models.resnet50(weights=None).state_dict()
    generator = torch.Generator().manual_seed(3)
    corners = {k: [min(side, 4) for side in v.shape] for k, v in state.items() if not k.endswith("tracked")}
    return {k: torch.rand(shape, generator=generator) for k, shape in corners.items()}


def resnet_file(path, state: dict, rename, options: Options | None = None, **entries):
    """Write `state` as a pickle with other names; return the backbone that is read from it."""
    path.write_bytes(pickle.dumps({**entries, "model": {n: v.numpy() for k, v in state.items() if (n := rename(k))}}, 2))
    weights = convert(read(path), options)
    assert not weights.unknown
    return backbone_part(weights.tensors)


def to_detectron2(name: str) -> str:
    first, _, rest = name.partition(".")
    if first in ("conv1", "bn1"):
        return f"stem.conv1.{'norm.' if first == 'bn1' else ''}{rest}"
    return f"res{int(first[5:]) + 1}.{block_of_detectron2(rest)}" if first.startswith("layer") else f"stem.{name}"


def to_caffe2(name: str) -> str | None:
    first, _, rest = name.partition(".")
    leaves = {"weight": "s", "bias": "b"}
    if first in ("conv1", "bn1"):
        return "conv1_w" if first == "conv1" else rest in leaves and f"res_conv1_bn_{leaves[rest]}"
    if first == "fc":
        return f"fc1000_{rest[0]}"
    block, layer, leaf = rest.replace("downsample.", "downsample").split(".")
    if leaf not in leaves:
        return None
    norm = layer.startswith("bn") or layer == "downsample1"
    branch = "1" if layer.startswith("downsample") else f"2{'abc'[int(layer[-1]) - 1]}"
    return f"res{int(first[5:]) + 1}_{block}_branch{branch}{'_bn' if norm else ''}_{leaves[leaf] if norm else 'w'}"


@pytest.fixture(scope="module")
def backbone(config):
    """`backbone("resnet50", path)` -> the state dict of backbone.weights=path."""
    return lambda name, path: backbone_weights(config(f"backbone={name}", f"backbone.weights={path}").backbone, None)


def test_backbones_alone_of_detectron2_and_caffe2(resnet50, tmp_path):
    """ResNets that detectron2 converted from torchvision keep RGB and its deviations; MSRA's are BGR, divided by 1."""
    plain, stem = backbone_part(convert(Stored(tmp_path, resnet50)).tensors), "stages.stem.0.weight"
    assert len(plain) == len(resnet50) - 2
    rgb = resnet_file(tmp_path / "rgb.pkl", resnet50, to_detectron2, __author__="torchvision")
    torch.testing.assert_close(rgb.pop(stem), plain[stem])
    assert same(rgb, {k: v for k, v in plain.items() if k != stem})
    flipped = (plain[stem].flip(1) * 255 * torch.tensor(STD)[:, None, None]).float()
    msra = resnet_file(tmp_path / "msra.pkl", resnet50, to_detectron2, Options(pixel_std=(1.0, 1.0, 1.0)))
    torch.testing.assert_close(msra[stem], flipped)
    # Caffe2's have no statistics: the batch norm is weight * x + bias.
    caffe2 = resnet_file(tmp_path / "caffe2.pkl", resnet50, to_caffe2)
    assert caffe2.keys() == plain.keys()
    assert all(torch.equal(v, plain[k]) for k, v in caffe2.items() if "running" not in k and k != stem)
    norm = {k.rpartition(".")[2]: v for k, v in caffe2.items() if k.startswith("stages.c4.1.bn2.")}
    x = torch.rand(1, 4, 2, 2)
    normed = F.batch_norm(x, norm["running_mean"], norm["running_var"], norm["weight"], norm["bias"])
    torch.testing.assert_close(normed, x * norm["weight"][:, None, None] + norm["bias"][:, None, None])


@pytest.mark.parametrize("author", ["MOCO", None])
def test_colours_that_a_pickle_does_not_say_are_asked_for(resnet50, tmp_path, author):
    path, entries = tmp_path / "moco.pkl", {"__author__": author} if author else {}
    words = (
        f"a ResNet for detectron2{' by MOCO' if author else ''}, which does not say its colours and strides; run .*--pixel-std"
    )
    for options in (None, Options(rgb=True)):
        with pytest.raises(UserError, match=words):
            resnet_file(path, resnet50, to_detectron2, options, **entries)
    options = Options(rgb=True, pixel_std=(58.395, 57.12, 57.375))  # as MoCo's configuration says
    imported = resnet_file(path, resnet50, to_detectron2, options, **entries)
    torch.testing.assert_close(imported["stages.stem.0.weight"], resnet50["conv1.weight"])
    assert convert(read(path), options).facts["stride_in_1x1"] == "false"


@pytest.mark.parametrize("entries", [{}, {"__author__": "me"}, {"iteration": 9}])
def test_colours_of_a_detector_that_is_not_the_zoos_are_asked_for(ours, tmp_path, entries):
    model, path = ours(3, "backbone=resnet18", *PYRAMID), tmp_path / "model.pkl"
    std = (57.375, 57.12, 58.395)  # in BGR
    tensors = detectron2_file(model, path, std, "backbone.bottom_up.")
    path.write_bytes(pickle.dumps({"model": {name: value.numpy() for name, value in tensors.items()}, **entries}))
    pth = tmp_path / "model.pth"  # as its training saves it
    torch.save({"model": tensors, **entries}, pth)
    for file in (path, pth):
        with pytest.raises(UserError, match=r"a detector for detectron2.*, which does not say its colours and strides; .* 1$"):
            fit_to_model(model, file)
        weights = fit_to_model(model, file, Options(pixel_std=std))
        stem = "backbone.stages.stem.0.weight"
        torch.testing.assert_close(weights.tensors[stem], model.state_dict()[stem], rtol=1e-6, atol=0)


def test_the_colours_that_a_backbone_is_read_with_are_printed(ours, backbone, tmp_path, capsys):
    detectron2_file(ours(3, "backbone=resnet18", *PYRAMID), tmp_path / "model.pkl", (1.0, 1.0, 1.0), "backbone.bottom_up.")
    backbone("resnet18", tmp_path / "model.pkl")
    printed = capsys.readouterr().err
    assert "model.pkl: colours: BGR, divided by 1, 1, 1" in printed and "align_v2" not in printed


# ------------------------------------------------------------------------------------------------------------------- strides


@pytest.mark.parametrize("prefix", ["", "backbone.body."])
def test_a_file_of_torchvision_has_its_strides_in_the_3x3(resnet50, tmp_path, prefix):
    stored = Stored(tmp_path / "r50.pth", {f"{prefix}{name}": value for name, value in resnet50.items()})
    expected = backbone_part(convert(stored).tensors)
    assert same(backbone_of(stored, "resnet50", expected), expected)
    with pytest.raises(UserError, match=r"r50.pth was trained with its strides elsewhere: set backbone.stride_in_1x1=false"):
        backbone_of(stored, "resnet50", expected, stride_in_1x1=True)
    # Ours, without its run's configuration, does not say it: the user does.
    own = Stored(tmp_path / "own.pt", {f"backbone.{name}": value for name, value in expected.items()})
    for stride_in_1x1 in (False, True):
        assert same(backbone_of(own, "resnet50", expected, stride_in_1x1), expected)


@pytest.mark.parametrize("caffe", [False, True])
def test_a_detector_of_torchvision_with_other_strides_gives_a_warning(config, monkeypatch, caffe):
    with torch.device("meta"):
        state = detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4).state_dict()
        overrides = ("backbone=resnet50", *JOINT, "neck.channels=256", "task.roi.fc_dim=1024", *[CAFFE] * caffe)
        model = build_detector(config(*overrides), num_classes=3)
    monkeypatch.setattr(loading, "read", lambda path: Stored(path, state))
    notes = fit_to_model(model, Path("tv.pth")).notes
    warning = "WARNING: it was trained with backbone.stride_in_1x1=false, but this network has true"
    assert [note for note in notes if "WARNING" in note] == [warning] * caffe


def by_hand(block: nn.Module, x: torch.Tensor, stride: int) -> torch.Tensor:
    """Compute a bottleneck of He et al. (2015): the first 1x1 has the stride."""

    def norm(layer: nn.Module, y: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(y, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=1e-5)

    y = F.relu(norm(block.bn1, F.conv2d(x, block.conv1.weight, stride=stride)))
    y = F.relu(norm(block.bn2, F.conv2d(y, block.conv2.weight, padding=1)))
    y = norm(block.bn3, F.conv2d(y, block.conv3.weight))
    if block.downsample is not None:
        x = norm(block.downsample[1], F.conv2d(x, block.downsample[0].weight, stride=stride))
    return F.relu(x + y)


def test_the_stride_moves_to_the_first_1x1_in_every_stage_and_in_conv5_as_a_head(ours):
    plain, moved = (ours(3, "ablation=c4", "backbone=resnet50", *JOINT, *more) for more in ((), (CAFFE,)))
    assert (has_stride_in_1x1(plain.backbone), has_stride_in_1x1(moved.backbone)) == (False, True)
    assert same(plain.state_dict(), moved.state_dict())
    stages = {**{n: s for n, s in moved.backbone.stages.items() if n != "stem"}, "c5": moved.roi.box_head.stage}
    others = {**plain.backbone.stages, "c5": plain.roi.box_head.stage}
    with torch.no_grad():
        for name, stage in stages.items():
            x = torch.rand(1, stage[0].conv1.in_channels, 9, 10, generator=torch.Generator().manual_seed(0))
            expected = x
            for number, block in enumerate(stage):
                expected = by_hand(block, expected, 2 if number == 0 and name != "c2" else 1)
            torch.testing.assert_close(stage(x), expected)
            assert torch.allclose(others[name](x), expected) == (name == "c2")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("backbone=resnet18", CAFFE), "stride_in_1x1=true needs bottlenecks, which resnet18 lacks"),
        (("backbone=resnet50", CAFFE), "weights=imagenet are made with the stride in the 3x3"),
        (("backbone=resnet50", "backbone.weights=pretrain", CAFFE), "weights=pretrain are made with the stride in the 3x3"),
    ],
)
def test_a_stride_that_cannot_be_moved_is_refused(config, overrides, message):
    with pytest.raises(UserError, match=message):
        config(*overrides)
    if "lacks" not in message:  # evaluated, its weights come from the file
        assert config(*overrides, "mode=evaluate", "weights=x.pkl").backbone.stride_in_1x1


def test_backbones_without_bottlenecks_are_left_alone():
    with torch.device("meta"):
        net = build_backbone(backbone_config("resnet18"))
    before = str(net)
    stride_to_1x1(net)
    assert str(net) == before and not has_stride_in_1x1(net)


# ----------------------------------------------------------------------------------------------------- what is loaded, or not


@pytest.mark.parametrize(("task", "heads", "left"), [("rpn", ("rpn",), "roi"), ("fast_rcnn", ("roi",), "rpn")])
def test_a_stage_that_the_network_lacks_is_left_out_with_a_note(ours, torchvision_file, task, heads, left):
    path, theirs = torchvision_file
    overrides = [*JOINT[2:], "neck.channels=256", *(["task.roi.fc_dim=16"] if task == "fast_rcnn" else [])]
    model = ours(3, "backbone=resnet18", f"task={task}", *overrides, heads=heads)
    notes = load(model, path)
    assert torch.equal(model.neck.lateral["p3"].weight, theirs["backbone.fpn.inner_blocks.1.0.weight"])
    assert sum(f"left out: {left}.*" in line for line in notes) == 1


def without(state: dict, *names: str) -> dict:
    return {k: v for k, v in state.items() if k not in names}


def of_four_classes(state: dict) -> dict:
    rows = {f"roi_heads.box_predictor.cls_score.{leaf}": 5 for leaf in ("weight", "bias")}
    rows |= {f"roi_heads.box_predictor.bbox_pred.{leaf}": 20 for leaf in ("weight", "bias")}
    return state | {name: torch.zeros(length, *state[name].shape[1:]) for name, length in rows.items()}


DAMAGES = {
    "classes": (
        of_four_classes,
        r"4 tensors are of another shape \(roi.predictor.scores.weight \(5, 16\) for \(4, 16\).*"
        "it has 4 classes, and the data have 3",
    ),
    "no second stage": (
        lambda s: {k: v for k, v in s.items() if not k.startswith("roi_heads.")},
        r"8 tensors are missing \(roi.box_head.fc6.weight",
    ),
    "missing": (
        lambda s: without(s, "backbone.fpn.inner_blocks.1.0.bias", "backbone.body.layer3.0.conv2.weight"),
        r"2 tensors are missing \(backbone.stages.c4.0.conv2.weight, neck.lateral.p3.bias\)",
    ),
    "no head": (lambda s: without(s, "rpn.head.conv.0.0.weight"), r"1 tensor is missing \(rpn.head.conv.weight\)"),
    "half a predictor": (
        lambda s: without(s, "roi_heads.box_predictor.cls_score.bias"),
        r"1 tensor is missing \(roi.predictor.scores.bias\)|roi.predictor.scores.bias",
    ),
    "shape": (
        lambda s: {**s, "backbone.body.conv1.weight": torch.zeros(64, 1, 7, 7)},
        r"backbone.stages.stem.0.weight \(64, 1, 7, 7\) for \(64, 3, 7, 7\)",
    ),
    "unexpected": (
        lambda s: {**s, "rpn.head.extra.weight": torch.zeros(1), "backbone.body.layer1.9.conv1.weight": torch.zeros(1)},
        r"2 tensors are unexpected \(backbone.stages.c2.9.conv1.weight, rpn.head.extra.weight\)",
    ),
    "many": (
        lambda s: {**s, **{f"roi_heads.more.{k}": torch.zeros(1) for k in range(14)}},
        r"14 tensors are unexpected \(roi_heads.more.0, .*, roi_heads.more.9, and 4 more\)",
    ),
    "version 2": (
        lambda s: {**s, "backbone.fpn.inner_blocks.0.1.weight": torch.zeros(256)},
        r"1 tensor is unexpected \(backbone.fpn.inner_blocks.0.1.weight\)",
    ),
    "agnostic": (
        lambda s: {**s, "roi_heads.box_predictor.bbox_pred.weight": torch.zeros(4, 16)},
        r"predictor has the wrong rows",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_not_whole_is_refused_with_names(ours, torchvision_file, tmp_path, damage):
    change, message = DAMAGES[damage]
    path = tmp_path / "damaged.pth"
    torch.save(change(torchvision_file[1]), path)
    with pytest.raises(UserError, match=message) as refused:
        fit_to_model(ours(3, "backbone=resnet18", *PYRAMID), path)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("kind", ["pth", "pkl", "safetensors"])
@pytest.mark.parametrize("how", ["half", "less a byte", "head"])
def test_a_file_that_is_cut_is_refused(tmp_path, kind, how):
    path, value = tmp_path / f"cut.{kind}", torch.rand(50, 3)
    if kind == "pth":
        torch.save({"conv1.weight": value}, path)
    elif kind == "pkl":
        path.write_bytes(pickle.dumps({"model": {"stem.conv1.weight": value.numpy()}}, 4))
    else:
        write_safetensors(path, {"backbone.stages.stem.0.weight": value}, {})
    whole = path.read_bytes()
    read(path)
    path.write_bytes(whole[: {"half": len(whole) // 2, "less a byte": -1, "head": 12}[how]])
    with pytest.raises(UserError, match=rf"cut\.{kind}: not a readable state dict"):
        read(path)


@pytest.mark.parametrize("content", [b"", b"some text\n" * 99, bytes(range(256)) * 9, b"\x80", b"PK\x03\x04", b"12345678{"])
def test_rubbish_is_refused(tmp_path, content):
    (tmp_path / "rubbish").write_bytes(content)
    with pytest.raises(UserError, match="rubbish: not a readable state dict"):
        read(tmp_path / "rubbish")


def test_a_safetensors_file_is_read_whatever_the_length_of_its_header(tmp_path):
    path, value = tmp_path / "row.safetensors", torch.rand(2)
    for length in range(0, 256, 8):  # one of them makes the first byte that of a pickle
        write_safetensors(path, {"backbone.stages.stem.0.weight": value}, {"note": "x" * length})
        assert torch.equal(read(path).tensors["backbone.stages.stem.0.weight"], value)


def test_files_that_would_be_run_by_torch_are_refused(tmp_path):
    torch.save(nn.Linear(1, 1), tmp_path / "module.pth")
    with pytest.raises(UserError, match="holds more than tensors") as refused:
        read(tmp_path / "module.pth")
    assert "weights_only" not in str(refused.value)


def test_no_file_and_no_run(tmp_path):
    with pytest.raises(UserError, match="none: no such file"):
        read(tmp_path / "none")
    with pytest.raises(UserError, match="no finished run"):
        read(tmp_path)


def test_backbone_weights_takes_the_backbone_of_a_detector(backbone, torchvision_file, ours, tmp_path):
    path, theirs = torchvision_file
    state = backbone("resnet18", path)
    assert torch.equal(state["stages.c5.1.conv2.weight"], theirs["backbone.body.layer4.1.conv2.weight"])
    # Row c4 has conv5 as its head; it belongs to the backbone.
    model = ours(3, "ablation=c4", "backbone=resnet18", *JOINT)
    torch.save(model.state_dict(), tmp_path / "c4.pt")
    state = backbone("resnet18", tmp_path / "c4.pt")
    assert torch.equal(state["stages.c5.1.conv2.weight"], model.roi.box_head.stage[1].conv2.weight)
    with pytest.raises(UserError, match=r"backbone.weights=.*c4.pt does not fit backbone=resnet34: \d+ tensors are missing"):
        backbone("resnet34", tmp_path / "c4.pt")


def test_a_deeper_resnet_is_not_taken_for_a_shallower_one():
    with torch.device("meta"):
        deep, expected = torchvision.models.resnet101(weights=None), build_backbone(backbone_config("resnet50"))
    with pytest.raises(UserError, match=r"does not fit backbone=resnet50: 255 tensors are unexpected"):
        backbone_of(Stored(Path("deep.pth"), deep.state_dict()), "resnet50", expected.state_dict())


TIMM = "which is not read; set backbone=timm/NAME"
OTHER_NETWORKS = {
    "fasterrcnn_resnet50_fpn_v2": "a detector of torchvision's second version .*, with batch norms in its FPN, which",
    "fasterrcnn_mobilenet_v3_large_fpn": "a detector of torchvision on another backbone than a ResNet, which is not read",
    "ssdlite320_mobilenet_v3_large": r"a detector of one stage \(SSD, or one of detectron2\), which is not read",
    "convnext_tiny": f"a network of torchvision's other than ResNets and MobileNetV2, {TIMM}",
    "efficientnet_b0": f"a network of torchvision's other than ResNets and MobileNetV2, {TIMM}",
    "resnext50_32x4d": rf"a ResNeXt \(its convolutions have 32 groups\), {TIMM}",
    "wide_resnet50_2": f"a wide ResNet, {TIMM}",
}


@pytest.mark.parametrize("name", OTHER_NETWORKS)
def test_the_first_words_about_a_network_that_is_not_read_say_what_it_is(monkeypatch, name):
    with torch.device("meta"):
        kind = detection if hasattr(detection, name) else torchvision.models
        state = getattr(kind, name)(weights=None, **({"weights_backbone": None} if kind is detection else {})).state_dict()
        expected = build_backbone(backbone_config("resnet50")).state_dict()
    monkeypatch.setattr(loading, "read", lambda path: Stored(path, state))
    with pytest.raises(UserError, match=f"^net.pth: {OTHER_NETWORKS[name]}"):
        open_weights(Path("net.pth"))
    if "resnet50_fpn" in name:  # its backbone is one that is read
        backbone_of(Stored(Path("net.pth"), state), "resnet50", expected)
    elif kind is not detection:
        with pytest.raises(UserError, match=f"^net.pth: {OTHER_NETWORKS[name]}"):
            backbone_of(Stored(Path("net.pth"), state), "resnet50", expected)


@pytest.mark.parametrize("rename", [to_detectron2, to_caffe2])
def test_a_resnext_of_detectron2_is_refused_by_name(monkeypatch, rename):
    with torch.device("meta"):
        state = torchvision.models.resnext50_32x4d(weights=None).state_dict()
    renamed = {new: value for name, value in state.items() if not name.endswith("tracked") and (new := rename(name))}
    monkeypatch.setattr(loading, "read", lambda path: Stored(path, renamed))
    with pytest.raises(UserError, match=rf"^X-101.pkl: a ResNeXt .*{TIMM}"):
        open_weights(Path("X-101.pkl"), Options(pixel_std=(57.375, 57.12, 58.395)))


def test_half_precision_is_loaded_as_single(ours, torchvision_file):
    path, theirs = torchvision_file
    weights = convert(Stored(path, {k: v.half() if v.is_floating_point() else v for k, v in theirs.items()}))
    model = ours(3, "backbone=resnet18", *PYRAMID)
    file = path.with_name("half.safetensors")
    write_safetensors(file, weights.tensors, weights.facts)
    load(model, file)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.rpn.head.conv.weight, theirs["rpn.head.conv.0.0.weight"].half().float())
    assert np.isfinite(model.rpn.head.conv.weight.detach().numpy()).all()


def test_a_file_with_nan_is_refused(torchvision_file, tmp_path):
    state = torch.load(torchvision_file[0])
    state["rpn.head.cls_logits.bias"][1] = torch.nan
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(UserError, match=r"1 tensors have NaN or infinity \(rpn.head.cls_logits.bias\)"):
        open_weights(tmp_path / "nan.pth")


def test_names_of_a_parallel_training_are_those_of_its_module(torchvision_file, tmp_path):
    state = torch.load(torchvision_file[0])
    parallel = {f"module.{key}": value for key, value in state.items()}
    torch.save({"model": parallel, "args": argparse.Namespace(lr=0.02)}, tmp_path / "ddp.pth")
    tensors, expected = open_weights(tmp_path / "ddp.pth").tensors, open_weights(torchvision_file[0]).tensors
    assert same(tensors, expected)

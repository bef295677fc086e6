"""Backbones: strides, freezing, and that the cut-up networks are torchvision's own."""

import copy
import functools
import urllib.error
from pathlib import Path

import pytest
import torch
import torchvision
from coco_sets import REAL
from networks import loaded_backbone, randomised
from parts import backbone_config
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FrozenBatchNorm2d

from fpn_ablate.engine import pretrain
from fpn_ablate.engine.inputs import world
from fpn_ablate.model import build
from fpn_ablate.model.backbones.base import STAGES, Backbone
from fpn_ablate.model.backbones.batch_norm import freeze_batch_norm
from fpn_ablate.model.backbones.torchvision import FEATURES
from fpn_ablate.model.ops.fold_batch_norm import FoldedBatchNorm2d, fold_batch_norm
from fpn_ablate.model.parts import BACKBONES
from fpn_ablate.utils.errors import UserError
from fpn_ablate.weights.backbone import backbone_weights, load_backbone, missing_download, weights_digest

NAMES = [name for name in BACKBONES if name != "timm"]  # tests of timm's have a file of their own
# In double precision two orders of the same sums agree closely.
IMAGES = torch.rand(1, 3, 65, 97, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [pytest.param((64, 64), marks=pytest.mark.slow), (65, 97), (31, 1)])
def test_levels_say_what_comes_out(name, size):
    with torch.device("meta"):
        backbone = made_on_meta(name)
        features = backbone(torch.empty(2, 3, *size))
    assert list(features) == ["c2", "c3", "c4", "c5"] == [level.name for level in backbone.levels]
    for level in backbone.levels:
        assert features[level.name].shape == (2, level.channels, *(-(-side // level.stride) for side in size))
    assert backbone.out_channels == features["c5"].shape[1]


def make(name: str, **keys: object) -> Backbone:
    narrow = {"width": 0.125, "weights": "pretrain"} if name in ("vgg16", "darknet53", "walkthrough") else {}
    return build.build_backbone(backbone_config(name, **narrow | keys))


@functools.cache
def made_on_meta(name: str) -> Backbone:
    """The layers of a deep one take longer than its shapes."""
    return make(name).eval()


def file_of(state: dict, folder: Path) -> str:
    torch.save(state, folder / "weights.pth")
    return str(folder / "weights.pth")


@pytest.mark.parametrize(
    "name", ["resnet18", *(pytest.param(n, marks=pytest.mark.slow) for n in ("resnet50", "resnext50_32x4d"))]
)
@pytest.mark.parametrize("frozen_bn", [True, False])
def test_resnet_features_are_torchvisions(config, tmp_path, name, frozen_bn):
    net = randomised(getattr(torchvision.models, name)(weights=None))
    path, frozen_bn = file_of(net.state_dict(), tmp_path), f"backbone.frozen_bn={frozen_bn}".lower()
    backbone = loaded_backbone(config(f"backbone={name}", f"backbone.weights={path}", frozen_bn))
    nodes = {f"layer{k}": f"c{k + 1}" for k in range(1, 5)}
    with torch.no_grad():
        expected, features = create_feature_extractor(net, nodes)(IMAGES), backbone(IMAGES)
    for level in ("c2", "c3", "c4", "c5"):
        torch.testing.assert_close(features[level], expected[level])


def stages_of(net: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """Every output of `features` before its resolution halves, and the last one."""
    maps, x = [], images
    for layer in net.features:
        y = layer(x)
        if y.shape[-1] < x.shape[-1]:
            maps.append(x)
        x = y
    return [*maps, x]


def check_features(config, name: str, state: dict, path: str) -> None:
    """Compare with torchvision's own, on sides that its poolings do not cut."""
    net, images = getattr(torchvision.models, name)(weights=None), IMAGES[..., :64, :96]
    net.load_state_dict(state)
    if name.startswith("mobilenet"):
        net.features = net.features[:-1]  # without the classifier's 1x1
    backbone = loaded_backbone(config(f"backbone={name}", f"backbone.weights={path}"))
    with torch.no_grad():
        expected, features = stages_of(net.eval().double(), images), backbone(images)
    for level, value in zip(("c5", "c4", "c3", "c2"), reversed(expected), strict=False):
        torch.testing.assert_close(features[level], value)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in ("vgg16", "convnext_tiny") else n for n in FEATURES]
)
def test_networks_of_numbered_features_are_torchvisions(config, tmp_path, name):
    state = randomised(getattr(torchvision.models, name)(weights=None)).state_dict()
    check_features(config, name, state, file_of(state, tmp_path))


def test_real_imagenet_weights_load_into_mobilenet(config):
    path = REAL / "pretrained" / "mobilenetv2_coral.pth"
    if not path.is_file():
        pytest.skip(f"no weights at {path}")
    check_features(config, "mobilenet_v2", torch.load(path, weights_only=True), str(path))


def test_weights_without_batch_counters_load(config, tmp_path):
    """Files older than torch 0.4.1, as torchvision's first ResNets, do not count batches."""
    net = randomised(torchvision.models.resnet18(weights=None))
    state = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    weights = f"backbone.weights={file_of(state, tmp_path)}"
    for frozen_bn in ("true", "false"):
        backbone = loaded_backbone(config("backbone=resnet18", weights, f"backbone.frozen_bn={frozen_bn}"))
        assert torch.equal(backbone.state_dict()["stages.c5.1.bn2.running_mean"], state["layer4.1.bn2.running_mean"])


def test_a_backbones_own_file_loads(config, tmp_path):
    state = randomised(make("small")).state_dict()
    backbone = loaded_backbone(config("backbone=small", f"backbone.weights={file_of(state, tmp_path)}"))
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file; give a file of weights, or none, shipped, pretrain, imagenet"),
        (b"not a file of torch", "not a readable state dict"),
        ({"model": {"conv1.weight": [0.0]}}, "expected a dictionary of tensors.*1 entries are no tensors, .* conv1.weight"),
        ({"model": {"conv1.weight": torch.zeros(1)}}, "does not fit backbone=resnet18: .* tensors are missing"),
        ([torch.zeros(1)], "expected a dictionary of tensors"),
        ({"weight": torch.zeros(1)}, "unknown names of weights .*weight"),
        ("resnet50", "does not fit backbone=resnet18: .* tensors are of another shape .stages.c2.0.conv1.weight"),
        ("mobilenet_v2", "does not fit backbone=resnet18: .* tensors are missing"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_its_name(config, tmp_path, content, message):
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        state = getattr(torchvision.models, content)().state_dict() if isinstance(content, str) else content
        torch.save(state, path)
    with pytest.raises(UserError, match=message) as refused:
        backbone_weights(config("backbone=resnet18", f"backbone.weights={path}").backbone, None)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("name", ["small", "small_deep", "resnet18", "mobilenet_v2", "mobilenet_v3_large", "darknet53"])
def test_frozen_batch_norm_computes_what_batch_norm_computes_in_evaluation(name):
    net = randomised(make(name))
    with torch.no_grad():
        expected = net(IMAGES)
        freeze_batch_norm(net)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
        features = net.double().train()(IMAGES)
    for level, value in expected.items():
        torch.testing.assert_close(features[level], value)


@pytest.mark.parametrize(("name", "freeze_at"), [*(("small", n) for n in range(6)), ("small_deep", 2), ("mobilenet_v2", 2)])
def test_freezing_takes_whole_stages_with_their_batch_statistics_out_of_training(name, freeze_at):
    backbone = make(name)
    backbone.freeze(freeze_at)
    trained = {stage for stage in STAGES for p in backbone.stages[stage].parameters() if p.requires_grad}
    assert trained == set(STAGES[freeze_at:])
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    backbone.train()(torch.rand(2, 3, 64, 64))
    changed = {k.split(".")[1] for k, v in backbone.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == set(STAGES[freeze_at:])


@pytest.mark.parametrize(
    ("name", "normed"),
    [("vgg16", ["c2", "c3"]), pytest.param("convnext_tiny", list(STAGES[1:]), marks=pytest.mark.slow)],
)
def test_norms_are_for_the_neck_alone(name, normed):
    """A norm on C2 would change C3 too, if the next stage read it."""
    plain, with_norms = randomised(make(name)), randomised(make(name, map_norm=True))
    with_norms.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        maps, features = plain(IMAGES), with_norms(IMAGES)
        for level, x in maps.items():
            expected = with_norms.map_norms[level](x) if level in normed else x
            torch.testing.assert_close(features[level], expected)
            assert (level in normed) == (not torch.allclose(features[level], x))
    assert [*with_norms.map_norms] == normed and not plain.map_norms


def test_darknet_and_the_walkthrough_have_their_published_sizes():
    with torch.device("meta"):
        darknet, plain = (build.build_backbone(backbone_config(name, width=1.0)) for name in ("darknet53", "walkthrough"))
        maps = plain(torch.empty(1, 3, 224, 224))
    weights = sum(m.weight.numel() for m in darknet.modules() if isinstance(m, nn.Conv2d))
    assert weights / 1e6 == pytest.approx(40.5, abs=0.1)  # yolov3.cfg's trunk
    assert sum(isinstance(m, nn.Conv2d) for m in darknet.modules()) == 52  # and a classifier
    assert sum(p.numel() for p in plain.parameters()) == 24_925_696
    assert [x.shape[1:] for x in maps.values()] == [(256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)]


def test_the_digest_of_weights_sees_names_and_values():
    state = {"a": torch.zeros(2), "b": torch.ones(2)}
    digests = [
        weights_digest(s)
        for s in (state, {"a": torch.zeros(2), "c": torch.ones(2)}, {**state, "a": torch.tensor([0.0, 1e-9])}, None)
    ]
    assert len(set(digests)) == 4
    assert weights_digest(dict(reversed(state.items()))) == digests[0]


@pytest.mark.parametrize("name", ["small", "small_deep", "resnet18", "mobilenet_v2", "vgg16", "walkthrough"])
@pytest.mark.parametrize(("deepest", "dropped"), [("c5", []), ("c4", ["c5"]), ("c2", ["c3", "c4", "c5"])])
def test_truncation_hands_back_the_stages_that_it_takes_out(name, deepest, dropped):
    """Put behind what is left, they compute what the whole did: the conv5 head continues a C4 backbone."""
    backbone = randomised(make(name))
    with torch.no_grad():
        whole = backbone(IMAGES)
        removed = backbone.truncate(deepest)
        features = backbone(IMAGES)
        assert list(removed) == dropped
        assert list(features) == [level for level in whole if level not in dropped]
        x = features[deepest]
        for stage, module in removed.items():
            x = module(x)
            torch.testing.assert_close(x, whole[stage])


def test_the_deep_small_backbone_is_the_small_one_with_a_second_block_in_each_stage():
    small, deep = make("small"), make("small_deep")
    assert small.levels == deep.levels
    assert set(small.stages["stem"].state_dict()) == set(deep.stages["stem"].state_dict())
    for stage in STAGES[1:]:
        first, second = deep.stages[stage]
        shapes = [{n: p.shape for n, p in block.state_dict().items()} for block in (small.stages[stage], first)]
        assert shapes[0] == shapes[1]
        assert not list(second.shortcut)


def test_the_deep_small_backbone_is_pre_trained_and_read_like_the_small_one(config, tmp_path):
    cfg = config("backbone=small_deep", "recipe=smoke")
    small_world = world(cfg.data, cfg.recipe.short_side)
    made = pretrain.load_or_pretrain(cfg.backbone, cfg.recipe.pretrain, small_world, tmp_path, torch.device("cpu"))
    state = torch.load(made.path, weights_only=True)
    model = build.build_detector(cfg)
    load_backbone(model, backbone_weights(cfg.backbone, made.path))
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_small_backbones_have_no_imagenet_weights(config):
    for name in ("small", "small_deep"):
        with pytest.raises(UserError, match=f"the {name} backbone has no ImageNet weights"):
            config(f"backbone={name}", "backbone.weights=imagenet")


@pytest.mark.parametrize(
    "name", ["small", "small_deep", "resnet18", pytest.param("resnet50", marks=pytest.mark.slow), "mobilenet_v2", "darknet53"]
)
def test_a_folded_batch_norm_computes_the_same_and_every_one_is_folded(name):
    """Values and all gradients, in double, with statistics and scales of every size."""
    plain = make(name)
    for n, (key, value) in enumerate(plain.state_dict().items()):
        if value.dim() == 1:
            low = 0.5 if key.endswith("running_var") else 0.1
            torch.nn.init.uniform_(value, low, 0.7, generator=torch.Generator().manual_seed(n))
    freeze_batch_norm(plain).double()
    folded = fold_batch_norm(copy.deepcopy(plain))
    assert {type(m) for m in folded.modules() if isinstance(m, FrozenBatchNorm2d)} == {FoldedBatchNorm2d}
    assert folded.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1)).double()
    results = []
    for net in (plain, folded):
        maps = net(x)
        sum((level / level.detach().abs().mean()).cos().sum() for level in maps.values()).backward()
        results.append(maps | {key: p.grad for key, p in net.named_parameters()})
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=1e-6, atol=1e-9 * float(value.detach().abs().max()), msg=key)


def test_a_copy_of_a_folded_network_folds_its_own_batch_norms():
    net = fold_batch_norm(freeze_batch_norm(make("small")))
    other = copy.deepcopy(net)
    for module in other.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.bias.fill_(1.0)
    x = torch.randn(1, 3, 64, 64)
    assert not torch.equal(net(x)["c5"], other(x)["c5"])
    assert torch.equal(net(x)["c5"], net(x)["c5"])


def test_imagenet_weights_out_of_reach_are_said_in_a_line(config, monkeypatch, tmp_path):
    def unreachable(*arguments, **options):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    message = r"https://.*resnet18.*pth cannot be downloaded .*no network.*backbone.weights=FILE"
    with pytest.raises(UserError, match=message):
        backbone_weights(config("backbone=resnet18").backbone, None)
    assert missing_download(config("backbone=resnet18").backbone).endswith("resnet18-f37072fd.pth")
    assert missing_download(config().backbone) is None

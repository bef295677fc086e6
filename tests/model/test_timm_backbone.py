"""Networks of timm as backbones: timm's own features, cut into our stages, and what is refused."""

import sys

import pytest
import torch
from networks import loaded_backbone, randomised
from parts import backbone_config
from settings import SCRATCH
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from fpn_ablate.model import build, init
from fpn_ablate.model.backbones.base import MEAN, STAGES, Backbone
from fpn_ablate.model.backbones.batch_norm import freeze_batch_norm
from fpn_ablate.model.backbones.timm import ChannelsLast
from fpn_ablate.model.ops.fold_batch_norm import FoldedBatchNorm2d
from fpn_ablate.model.optimise import optimise
from fpn_ablate.structures.instances import Targets
from fpn_ablate.sweep.checks import check_parts
from fpn_ablate.utils.errors import UserError
from fpn_ablate.weights.backbone import backbone_weights, load_backbone

timm = pytest.importorskip("timm", reason='timm is not installed: pip install "fpn-ablate[timm]"')

SMALL = ("test_resnet", "test_convnext", "test_byobnet", "test_efficientnet")
SWIN = "swin_tiny_patch4_window7_224"
IMAGES = torch.rand(1, 3, 64, 160, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def timm_backbone(model: str) -> Backbone:
    return build.build_backbone(backbone_config(f"timm/{model}"))


def features_of(net: nn.Module) -> dict[str, torch.Tensor]:
    """By timm's other way, which leaves the whole network as it is: the last map of each size."""
    maps = net.forward_intermediates(IMAGES, intermediates_only=True)
    by_stride = {IMAGES.shape[-1] // x.shape[-1]: x for x in maps}
    return {f"c{k}": by_stride[2**k] for k in range(2, 6)}


@pytest.mark.parametrize("frozen_bn", [True, False])
@pytest.mark.parametrize("model", SMALL)
def test_features_are_timms_with_a_file_in_timms_names(config, tmp_path, model, frozen_bn):
    net, path = randomised(timm.create_model(model)), tmp_path / "weights.pth"
    torch.save(net.state_dict(), path)
    cfg = config(f"backbone=timm/{model}", f"backbone.weights={path}", f"backbone.frozen_bn={frozen_bn}".lower())
    with torch.no_grad():
        expected, maps = features_of(net), loaded_backbone(cfg)(IMAGES)
    assert list(maps) == ["c2", "c3", "c4", "c5"]
    for level, value in expected.items():
        torch.testing.assert_close(maps[level], value)


@pytest.mark.slow
def test_vgg_is_cut_at_its_pooling():
    net, backbone = randomised(timm.create_model("vgg11", features_only=True)), timm_backbone("vgg11").double()
    backbone.load_state_dict({k: net.state_dict()[k.split(".", 2)[2]] for k in backbone.state_dict()})
    with torch.no_grad():
        for x, expected in zip(backbone(IMAGES).values(), net(IMAGES)[2:], strict=True):
            torch.testing.assert_close(x, expected)


@pytest.mark.slow  # the sizes of swin's levels are tested above
def test_swin_takes_any_size_and_hands_out_channels_first():
    """Its windows and their shift are the same at every size: at that it was made for, and no more there, timm clips them."""
    net = timm.create_model(SWIN, strict_img_size=False, always_partition=True)
    backbone = timm_backbone(SWIN).eval().double()
    state = randomised(net).state_dict()
    backbone.load_state_dict({k: state[k.split(".", 2)[2].replace("layers_", "layers.")] for k in backbone.state_dict()})
    with torch.no_grad():
        expected, maps = features_of(net), backbone(IMAGES)
        for level, value in expected.items():
            torch.testing.assert_close(maps[level], value)
        removed = backbone.truncate("c4")
        torch.testing.assert_close(removed["c5"](backbone(IMAGES)["c4"]), expected["c5"])
    assert isinstance(removed["c5"], ChannelsLast)


@pytest.mark.parametrize("model", ["resnext50_32x4d", "convnext_tiny", "vgg16_bn", SWIN, "mobilenetv3_small_050"])
def test_levels_say_what_comes_out(model, size=(32, 160)):
    with torch.device("meta"):
        backbone = timm_backbone(model).eval()
        features = backbone(torch.empty(2, 3, *size))
    assert list(features) == [level.name for level in backbone.levels]
    for level in backbone.levels:
        assert features[level.name].shape == (2, level.channels, size[0] // level.stride, size[1] // level.stride)
    assert backbone.out_channels == features["c5"].shape[1]


@pytest.mark.parametrize(
    ("model", "stem", "c2"),
    [
        ("resnext50_32x4d", ["conv1", "bn1", "act1", "maxpool"], ["layer1"]),
        ("convnext_tiny", ["stem_0", "stem_1"], ["stages_0"]),
        ("vgg11", [f"features_{n}" for n in range(6)], [f"features_{n}" for n in range(6, 10)]),
        (SWIN, ["patch_embed"], ["layers_0"]),
    ],
)
def test_the_stem_ends_where_the_second_stage_begins(model, stem, c2):
    with torch.device("meta"):
        stages = timm_backbone(model).stages
    assert [[name for name, _ in stages[stage].named_children()] for stage in ("stem", "c2")] == [stem, c2]


@pytest.mark.parametrize("model", ["test_resnet", "test_byobnet", "test_efficientnet"])
def test_a_frozen_norm_keeps_the_activation_that_timm_puts_into_it(model):
    backbone = randomised(timm_backbone(model))
    with torch.no_grad():
        expected = backbone(IMAGES)
        freeze_batch_norm(backbone).double()
        assert not any(isinstance(m, nn.BatchNorm2d) for m in backbone.modules())
        maps = backbone.train()(IMAGES)
    for level, value in expected.items():
        torch.testing.assert_close(maps[level], value)


def test_layer_norm_is_frozen_by_its_stage_alone(config):
    model = build.build_detector(config("backbone=timm/test_convnext", "backbone.freeze_at=2"))
    norms = {stage: [m for m in model.backbone.stages[stage].modules() if isinstance(m, nn.LayerNorm)] for stage in STAGES}
    for stage, layers in norms.items():
        assert layers and all(m.weight.requires_grad == (stage not in ("stem", "c2")) for m in layers)


def test_batch_norms_of_timm_are_not_folded(config):
    """Its blocks need not list their layers in the order in which they run."""
    network = optimise(build.build_detector(config("backbone=timm/test_resnet")), torch.device("cpu"))
    norms = [m for m in network.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert norms and not any(isinstance(m, FoldedBatchNorm2d) for m in norms)


@pytest.mark.parametrize("model", ["test_resnet", "test_convnext"])
def test_every_part_learns_from_random_weights(config, model):
    cfg = config(f"backbone=timm/{model}", *SCRATCH)
    network, generator = build.build_detector(cfg), torch.Generator().manual_seed(0)
    init.initialise(network, 0)
    images = torch.randint(0, 256, (2, 3, 64, 96), generator=generator, dtype=torch.uint8)
    valid = torch.tensor([[True], [True]])
    objects = torch.tensor([[[4.0, 4, 40, 40]], [[8.0, 8, 60, 50]]])
    targets = Targets(objects, valid.long(), valid, ~valid, torch.tensor([[64, 96], [64, 96]]))
    sum(network.train().losses(images, targets, lambda purpose: generator).values()).backward()
    parameters = dict(network.named_parameters())
    assert {n for n, p in parameters.items() if p.grad is None} == set()
    assert all(p.grad.isfinite().all() for p in parameters.values())
    assert sum(p.grad.abs().sum() > 0 for p in parameters.values()) > 0.9 * len(parameters)


def test_no_module_draws_from_the_global_generator():
    backbone = timm_backbone(SWIN).train()  # timm's default drops whole paths at random
    state = torch.get_rng_state()
    with torch.no_grad():
        backbone(IMAGES.float())
    assert torch.equal(torch.get_rng_state(), state)


def test_images_are_normalised_as_the_network_was_trained(config):
    network = build.build_detector(config("backbone=timm/test_resnet"))
    seen = []
    network.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    images, sizes = torch.full((1, 3, 64, 64), 255, dtype=torch.uint8), torch.tensor([[64, 32]])
    network.features(images, sizes)
    torch.testing.assert_close(seen[0][..., :32], torch.ones(1, 3, 64, 32))  # mean and deviation 0.5
    assert seen[0][..., 32:].abs().sum() == 0
    assert timm_backbone("resnext50_32x4d").mean == MEAN


TWO = ("ablation=c4", "task=faster_rcnn")


def test_the_conv5_head_is_timms_last_stage(config, tmp_path):
    net, path = randomised(timm.create_model("test_resnet")), tmp_path / "weights.pth"
    torch.save(net.state_dict(), path)
    cfg = config(*TWO, "backbone=timm/test_resnet", f"backbone.weights={path}")
    network = build.build_detector(cfg, num_classes=3, heads=("roi",))
    load_backbone(network, backbone_weights(cfg.backbone, None))
    x = torch.rand(2, network.roi.pooler.in_channels, 14, 14, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(network.roi.box_head.eval().double()(x), net.layer4(x).mean((2, 3)))
    assert "c5" not in network.backbone.stages


def test_resnext_has_a_conv5_head_and_vgg_has_none(config):
    with torch.device("meta"):
        head = build.build_detector(config(*TWO, "backbone=timm/resnext50_32x4d"), heads=("roi",)).eval().roi.box_head
        assert head(torch.empty(5, 1024, 14, 14)).shape == (5, 2048)
        with pytest.raises(UserError, match=r"backbone=timm/vgg11 has only pooling behind C4.*task.roi.head=2fc"):
            build.build_detector(config(*TWO, "backbone=timm/vgg11"), heads=("roi",))
        build.build_detector(config(*TWO, "backbone=timm/vgg11", "task.roi.head=2fc"), heads=("roi",))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("resnext50", r"timm \S+ has no such model. Did you mean timm/\w+"),
        ("resnet50.zzz", "timm has no such weights. It has: .*a1_in1k"),
        ("test_vit", "its maps have strides 16, 16, 16; a pyramid needs 4, 8, 16 and 32, and 4, 8, 32 is missing"),
        ("test_maxvit", "fails on an image of 96 x 160"),
        ("hrnet_w18_small", "timm extracts its features as a HighResolutionNetFeatures, which is not a sequence of modules"),
    ],
)
def test_what_cannot_be_a_backbone_is_refused(config, model, message):
    with pytest.raises(UserError, match=f"backbone=timm/{model}: {message}"):
        check_parts(config(f"backbone=timm/{model}"))


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r'timm is not installed; pip install "fpn-ablate\[timm\]"'):
        timm_backbone("test_resnet")


def test_weights_that_cannot_be_downloaded_are_refused(config, monkeypatch):
    create = timm.create_model

    def offline(*args, pretrained=False, **options):
        if pretrained:
            raise OSError("no route to host\nand more")
        return create(*args, **options)

    cfg = config("backbone=timm/test_resnet", "backbone.weights=imagenet")
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match=r"timm's weights of test_resnet cannot be downloaded \(no route to host\).*FILE"):
        backbone_weights(cfg.backbone, None)


def test_timms_own_weights_come_in_our_names(config, monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda *a, pretrained=False, **o: randomised(create(*a, **o)) if pretrained else create(*a, **o)
    )
    cfg = config("backbone=timm/test_convnext", "backbone.weights=imagenet")
    network = build.build_detector(cfg)
    load_backbone(network, backbone_weights(cfg.backbone, None))
    reference = randomised(create("test_convnext", features_only=True))(IMAGES)
    with torch.no_grad():
        for x, expected in zip(network.backbone.eval().double()(IMAGES).values(), reference, strict=True):
            torch.testing.assert_close(x, expected)


def test_a_file_that_does_not_fit_is_refused(config, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_convnext").state_dict(), path)
    cfg = config("backbone=timm/test_resnet", f"backbone.weights={path}")
    with pytest.raises(UserError, match=r"weights.pth does not fit backbone=timm/test_resnet: \d+ tensors are missing"):
        backbone_weights(cfg.backbone, None)


def test_our_own_names_load_too(config, tmp_path):
    state, path = randomised(timm_backbone("test_resnet")).state_dict(), tmp_path / "weights.pth"
    torch.save(state, path)
    backbone = loaded_backbone(config("backbone=timm/test_resnet", f"backbone.weights={path}"))
    assert all(torch.equal(value, state[name]) for name, value in backbone.state_dict().items())


def test_a_model_is_named_whole_in_row_and_recipe(config):
    assert config("backbone=timm/test_resnet").recipe.name == "smoke+backbone=timm/test_resnet"
    names = {config(f"backbone={name}", "factors=[backbone]").row for name in ("timm/resnet18", "resnet18", "timm/resnet34")}
    assert names == {"fpn+backbone=timm/resnet18", "fpn+backbone=resnet18", "fpn+backbone=timm/resnet34"}
    spelt, short = config("backbone=timm", "backbone.model=test_resnet"), config("backbone=timm/test_resnet")
    assert spelt.backbone == short.backbone


def test_the_model_is_a_key_of_timm_alone(config):
    with pytest.raises(UserError, match=r"backbone.model with backbone=small: there is no such key"):
        config("backbone=small", "+backbone.model=test_resnet")
    with pytest.raises(UserError, match=r"backbone.model: say which: backbone=timm/MODEL"):
        config("backbone=timm")
    with pytest.raises(UserError, match="weights=none starts from random weights"):
        config("backbone=timm/test_resnet", "backbone.weights=none")


@pytest.mark.slow
def test_darknet53_is_timms():
    net = randomised(timm.create_model("darknet53", features_only=True, out_indices=(2, 3, 4, 5)))
    for module in net.modules():
        if isinstance(module, nn.LeakyReLU):
            module.negative_slope = 0.1  # as Darknet's configuration has it; timm takes torch's default
    backbone = build.build_backbone(backbone_config("darknet53", weights="pretrain")).double()
    ours, theirs = backbone.state_dict(), net.state_dict()
    backbone.load_state_dict(dict(zip(ours, theirs.values(), strict=True)))
    with torch.no_grad():
        for x, expected in zip(backbone.eval()(IMAGES).values(), net.eval().double()(IMAGES), strict=True):
            torch.testing.assert_close(x, expected)

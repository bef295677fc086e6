"""Rows as built: gradients everywhere, weights shared where names and shapes agree."""

import pytest
import torch
import torchvision
from networks import randomised
from settings import JOINT, ROWS, SCRATCH
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from fpn_ablate.model.backbones.base import MEAN, STD
from fpn_ablate.model.build import build_backbone, build_detector
from fpn_ablate.model.heads.box_head import Conv5, TwoFC
from fpn_ablate.model.init import initialise
from fpn_ablate.model.summary import finest_level_reach, row_facts
from fpn_ablate.structures.instances import Proposals, Targets
from fpn_ablate.utils.errors import UserError
from fpn_ablate.weights.backbone import backbone_weights, load_backbone

SWITCHES = (
    *(("neck=single_level", f"neck.level={level}") for level in ("c2", "c3", "c4", "c5")),
    *((f"neck.output={level}",) for level in ("p2", "p3", "p4", "p5")),
    *((f"neck.upsample={mode}",) for mode in ("nearest", "bilinear", "deconv")),
    *((f"neck.smooth={which}",) for which in ("all", "merged", "none")),
    *((f"neck.p6={how}",) for how in ("subsample", "conv", "none")),
    ("neck.channels=8",),
    ("neck.top_down=false", "neck.smooth=merged"),
    ("neck.lateral=false", "neck.output=p3", "neck.upsample=deconv"),
)

TASKS = {"rpn": (), "fast_rcnn": ("task=fast_rcnn",), "joint": JOINT}


def of_task(config, task, *overrides):
    """Compose `overrides`, which name no key of a task, once for all tasks: that takes longer than a small network does."""
    return config(*overrides).model_copy(update={"task": config(*TASKS[task]).task})


def built(cfg, seed=0, **how):
    model = build_detector(cfg, **how)
    initialise(model, seed)
    return model


def batch(side=64):
    """Two images; objects of each scale, so that every level has something to learn, of anchors as well as of RoIs."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, side, side), generator=generator, dtype=torch.uint8)
    sizes = torch.tensor([[side, side], [side, side - 9]])
    gt = torch.tensor([[[4.0, 4, 9, 9], [20, 20, 40, 40], [0, 0, 60, 60]], [[30, 8, 42, 24], [0, 0, 0, 0], [0, 0, 0, 0]]])
    valid = torch.tensor([[True, True, True], [True, False, False]])
    return images, Targets(gt, torch.tensor([[1, 2, 3], [2, 0, 0]]), valid, torch.zeros_like(valid), sizes)


def proposals(number=20):
    """Some of each size, and padding."""
    corner, size = torch.rand(2, 2, number, 2, generator=torch.Generator().manual_seed(1)) * 40
    valid = torch.arange(number) < torch.tensor([[number], [number // 2]])
    return Proposals(torch.cat([corner, corner + size + 2], -1) * valid[..., None], valid.float(), valid)


def gradients(model):
    """Names of the parameters that are trained, and of those that get a gradient."""
    images, targets = batch()
    generator = torch.Generator().manual_seed(0)
    sum(model.losses(images, targets, lambda purpose: generator, None if model.rpn else proposals()).values()).backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    return trained, {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


@pytest.mark.parametrize("overrides", [*((f"ablation={row}",) for row in ROWS), *SWITCHES], ids=" ".join)
@pytest.mark.parametrize("task", TASKS)
def test_every_trained_parameter_of_every_row_gets_a_gradient(config, overrides, task):
    model = built(of_task(config, task, *overrides), num_classes=3)
    trained, reached = gradients(model)
    if task == "fast_rcnn" and "neck.p6=conv" in overrides:
        trained = {name for name in trained if "p6" not in name}  # built for the RPN, which this network lacks
    assert trained == reached
    assert {name for name in trained if name.startswith(("backbone.stages.stem", "backbone.stages.c2."))} == set()
    parts = {"rpn": {"rpn"}, "fast_rcnn": {"roi"}, "joint": {"rpn", "roi"}}[task]
    assert {name.split(".")[0] for name in reached} - {"backbone", "neck"} == parts


@pytest.mark.parametrize("row", ["own_heads", "no_1x1", "from_c4", "l2_norm"])
def test_every_trained_parameter_gets_a_gradient_where_levels_share_no_head(config, row):
    """Objects are an anchor of each level, or the deltas of a level without a positive one would learn nothing."""
    model, (images, targets) = built(config(f"ablation=ssd/{row}", "rpn.samples=1000")), batch()
    grids = model.rpn(model.features(images, targets.sizes))[2]
    gt = torch.stack([grid[len(grid) // 2] for grid in grids]).expand(2, -1, 4)
    flags = torch.ones(gt.shape[:2], dtype=torch.bool)
    targets = Targets(gt, flags.long(), flags, ~flags, targets.sizes)
    sum(model.losses(images, targets, lambda purpose: torch.Generator().manual_seed(0)).values()).backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, gradient in trained.items() if gradient is None or not gradient.any()} == set()
    assert len([name for name in trained if "objectness.weight" in name]) == len(model.neck.levels)


@pytest.mark.parametrize(
    ("task", "backbone"), [("rpn", "small"), ("joint", "small"), pytest.param("rpn", "resnet18", marks=pytest.mark.slow)]
)
def test_rows_share_the_weights_that_they_share_by_name_and_shape(config, task, backbone):
    """Also with a second stage: pyramids and P2 have it whole, C4 and C5 its predictor where the widths agree."""
    overrides = (f"backbone={backbone}", *SCRATCH)
    rows = {row: built(of_task(config, task, f"ablation={row}", *overrides)).state_dict() for row in ROWS}
    reference = rows["fpn"]
    for row, state in rows.items():
        shared = {n for n in state if n in reference and state[n].shape == reference[n].shape}
        assert {n for n in state if n.startswith("backbone.")} <= shared, row
        assert all(torch.equal(state[n], reference[n]) for n in shared), row
        if task == "joint" and row not in ("c4", "c5"):
            assert {n for n in state if n.startswith("roi.")} <= shared, row


def test_tasks_share_the_weights_that_they_share_by_name(config):
    rpn, fast, joint = (built(config(*SCRATCH, *TASKS[task]), num_classes=3).state_dict() for task in TASKS)
    assert rpn.keys() | fast.keys() == joint.keys()
    assert not {n for n in rpn if n.startswith("roi.")} | {n for n in fast if n.startswith("rpn.")}
    for state in (rpn, fast):
        assert all(torch.equal(state[n], joint[n]) for n in state)


def test_another_seed_gives_other_weights_and_the_global_generator_none(config):
    cfg = config(*SCRATCH, "neck.upsample=deconv", "neck.upsample_init=random")
    torch.manual_seed(1)
    first = built(cfg).state_dict()
    torch.manual_seed(2)
    again, other = built(cfg).state_dict(), built(cfg, seed=1).state_dict()
    drawn = [n for n, value in first.items() if value.dim() > 1]
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not any(torch.equal(first[n], other[n]) for n in drawn)
    assert len({float(first[n].flatten()[0]) for n in drawn}) == len(drawn)  # no two parts start alike


def test_initial_distributions(config):
    """Detectron's: Gaussian 0.01 in the RPN and for classes, 0.001 for boxes; Xavier in the neck and the 2 fc; biases 0."""
    state = built(config("neck.channels=64", *JOINT), num_classes=50).state_dict()
    assert float(state["roi.predictor.scores.weight"].std()) == pytest.approx(0.01, rel=0.1)
    assert float(state["roi.predictor.deltas.weight"].std()) == pytest.approx(0.001, rel=0.1)
    fc6 = state["roi.box_head.fc6.weight"]
    assert fc6.shape == (16, 64 * 49)
    assert float(fc6.abs().max()) == pytest.approx((6 / (16 + 64 * 49)) ** 0.5, rel=0.05)
    assert float(state["rpn.head.conv.weight"].std()) == pytest.approx(0.01, rel=0.1)
    lateral = state["neck.lateral.p5.weight"]
    assert float(lateral.abs().max()) == pytest.approx((6 / (lateral.shape[0] + lateral.shape[1])) ** 0.5, rel=0.05)
    smooth = state["neck.smooth.p2.weight"]
    assert float(smooth.abs().max()) == pytest.approx((6 / (9 * (64 + 64))) ** 0.5, rel=0.05)
    assert not any(value.any() for name, value in state.items() if name.endswith("bias") and not name.startswith("backbone"))


def test_conv5_as_a_head_starts_as_the_backbone_does(config):
    model = build_detector(config("ablation=c4", "task=fast_rcnn", "backbone=resnet18"), num_classes=3)
    initialise(model, 0)
    convs = [m for part in (model.backbone, model.roi.box_head) for m in part.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convs) == 20
    for conv in convs:  # He et al. 2015, fan-out
        fan_out = conv.out_channels * conv.kernel_size[0] * conv.kernel_size[1]
        assert float(conv.weight.detach().std()) == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)


def test_what_is_built_is_what_is_asked_for(config):
    for heads in (("rpn",), ("roi",), ("rpn", "roi")):
        model = build_detector(config("task=fast_rcnn"), heads=heads)
        assert [name for name in ("rpn", "roi") if getattr(model, name)] == list(heads)


def test_normalised_images_have_imagenets_statistics_inside_and_0_outside(config):
    images = torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8)
    sizes = torch.tensor([[8, 12], [5, 7]])
    x = build_backbone(config().backbone).normalise(images, sizes)
    expected = (images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(x[0], expected[0])
    torch.testing.assert_close(x[1, :, :5, :7], expected[1, :, :5, :7])
    assert not x[1, :, 5:].any()
    assert not x[1, :, :, 7:].any()


@pytest.mark.parametrize(
    ("row", "feature", "lateral", "top_down", "reach"),
    [
        ("c4", "C4", False, False, ["c4"]),
        ("c5", "C5", False, False, ["c5"]),
        ("fpn", "{Pk}", True, True, ["c2", "c3", "c4", "c5"]),
        ("bottom_up", "{Pk}", True, False, ["c2"]),
        ("no_lateral", "{Pk}", False, True, ["c5"]),
        ("finest", "P2", True, True, ["c2", "c3", "c4", "c5"]),
    ],
)
def test_the_verifier_says_what_each_row_is(config, row, feature, lateral, top_down, reach):
    cfg = config(f"ablation={row}")
    facts = row_facts(cfg)
    assert (facts.feature, facts.lateral, facts.top_down, facts.reach) == (feature, lateral, top_down, reach)
    assert finest_level_reach(cfg) == reach
    model = built(cfg)
    assert facts.params == sum(p.numel() for p in model.parameters())
    assert facts.trained == sum(p.numel() for p in model.parameters() if p.requires_grad) < facts.params


# ---------------------------------------------------------------------------------------------------------- second stage


def test_pooling_and_width_of_the_second_stage_come_from_the_configuration(config):
    written = "pooling=pool canonical_level=3 sampling_ratio=0 resolution=5 fc_dim=12 canonical_box_size=100"
    cfg = config(*TASKS["fast_rcnn"], *(f"task.roi.{pair}" for pair in written.split()))
    roi = build_detector(cfg, num_classes=7, short_side=400).roi
    assert (roi.pooler.pooling, roi.pooler.canonical_level, roi.pooler.sampling_ratio) == ("pool", 3, 0)
    assert (roi.pooler.resolution, roi.pooler.canonical_box_size) == (5, 50)
    assert (roi.box_head.fc6.in_features, roi.box_head.fc7.out_features) == (cfg.recipe.channels * 25, 12)
    assert (roi.predictor.scores.out_features, roi.predictor.deltas.out_features) == (8, 28)


def test_the_size_in_equation_1_scales_with_the_short_side_as_the_anchors_do(config):
    """An anchor of the paper's 224 pixels is one of 224 * 64 / 800 in images of a short side of 64."""
    cfg = config(*TASKS["joint"])
    for side in (800, 256, cfg.recipe.short_side):
        model = build_detector(cfg, short_side=side)
        assert model.roi.pooler.canonical_box_size == pytest.approx(224 * side / 800)
        assert model.rpn.level_sizes[3][0] / model.roi.pooler.canonical_box_size == pytest.approx(256 / 224)
    assert build_detector(cfg).roi.pooler.canonical_box_size == pytest.approx(224 * 64 / 800)


@pytest.mark.parametrize(
    ("overrides", "kind", "resolution", "levels"),
    [
        (("ablation=c4",), Conv5, 14, ["c4"]),
        (("ablation=c4", "task.roi.head=conv5"), Conv5, 14, ["c4"]),
        (("ablation=c4", "task.roi.head=2fc"), TwoFC, 7, ["c4"]),
        (("ablation=c5",), TwoFC, 7, ["c5"]),
        (("ablation=finest",), TwoFC, 7, ["p2"]),
        *(((f"ablation={row}",), TwoFC, 7, ["p2", "p3", "p4", "p5"]) for row in ("fpn", "bottom_up", "no_lateral")),
        (("ablation=fpn", "neck.p6=none"), TwoFC, 7, ["p2", "p3", "p4", "p5"]),
    ],
)
def test_the_head_of_each_row(config, overrides, kind, resolution, levels):
    model = built(config(*TASKS["fast_rcnn"], *overrides), num_classes=3)
    assert isinstance(model.roi.box_head, kind)
    assert model.roi.pooler.resolution == resolution
    assert [level.name for level in model.roi.pooler.levels] == levels
    trained, reached = gradients(model)
    assert trained == reached


@pytest.mark.parametrize("row", ["c5", "fpn", "finest", "bottom_up"])
def test_conv5_as_a_head_is_refused_where_the_backbone_has_run_it_already(config, row):
    with pytest.raises(UserError, match="conv5"):
        config(*TASKS["fast_rcnn"], f"ablation={row}", "task.roi.head=conv5")


@pytest.mark.parametrize("name", ["resnet18", pytest.param("resnet50", marks=pytest.mark.slow)])
@pytest.mark.parametrize("frozen_bn", [pytest.param(True, marks=pytest.mark.slow), False])
def test_the_conv5_head_is_torchvisions_layer4(config, tmp_path, name, frozen_bn):
    net, path = randomised(getattr(torchvision.models, name)(weights=None)), tmp_path / "weights.pth"
    torch.save(net.state_dict(), path)
    cfg = config(
        "ablation=c4",
        *TASKS["fast_rcnn"],
        f"backbone={name}",
        f"backbone.weights={path}",
        f"backbone.frozen_bn={str(frozen_bn).lower()}",
    )
    model = built(cfg)
    load_backbone(model, backbone_weights(cfg.backbone, None))
    head = model.roi.box_head.eval().double()
    x = torch.randn(3, model.roi.pooler.in_channels, 14, 14, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        expected = net.layer4(x)
        assert expected.shape[-2:] == (7, 7)
        torch.testing.assert_close(head(x), expected.mean((2, 3)))
    state = net.layer4.state_dict()
    head_state = head.stage.state_dict()
    assert {n for n in state if not (frozen_bn and n.endswith("num_batches_tracked"))} == head_state.keys()
    assert all(torch.equal(head_state[n], state[n]) for n in head_state)
    assert "c5" not in model.backbone.stages
    norms = {type(m) for m in head.modules() if isinstance(m, nn.BatchNorm2d | FrozenBatchNorm2d)}
    assert norms == {FrozenBatchNorm2d if frozen_bn else nn.BatchNorm2d}
    assert all(p.requires_grad for p in head.parameters())


@pytest.mark.parametrize("row", [pytest.param("c5", marks=pytest.mark.slow), "fpn"])
def test_the_backbone_is_filled_with_a_second_stage_as_without(config, tmp_path, row):
    net, path = randomised(torchvision.models.resnet18(weights=None)), tmp_path / "weights.pth"
    torch.save(net.state_dict(), path)
    cfg = config(f"ablation={row}", *TASKS["fast_rcnn"], "backbone=resnet18", f"backbone.weights={path}")
    model = built(cfg)
    load_backbone(model, backbone_weights(cfg.backbone, None))
    assert torch.equal(model.backbone.stages["c5"][1].conv2.weight, net.layer4[1].conv2.weight)
    assert model.roi.box_head.fc6.in_features == 49 * (512 if row == "c5" else cfg.recipe.channels)

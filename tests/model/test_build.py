"""Rows as built: gradients everywhere, weights shared where names and shapes agree."""

import pytest
import torch

from fpn_ablate.model.build import build_detector, initialise, rpn_settings
from fpn_ablate.model.detector import MEAN, STD, normalise
from fpn_ablate.model.rpn import Targets
from fpn_ablate.verify import finest_level_reach, row_facts

ROWS = ("c4", "c5", "fpn", "bottom_up", "no_lateral", "finest")
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


def built(cfg, seed=0):
    model = build_detector(cfg)
    initialise(model, seed)
    return model


def batch(side=64):
    """Two images; objects on the anchors of each scale, so that every level has something to learn."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, side, side), generator=generator, dtype=torch.uint8)
    sizes = torch.tensor([[side, side], [side, side - 9]])
    gt = torch.tensor([[[4.0, 4, 9, 9], [20, 20, 40, 40], [0, 0, 60, 60]], [[30, 8, 42, 24], [0, 0, 0, 0], [0, 0, 0, 0]]])
    valid = torch.tensor([[True, True, True], [True, False, False]])
    return images, Targets(gt, valid, torch.zeros_like(valid), sizes)


@pytest.mark.parametrize("overrides", [*((f"ablation={row}",) for row in ROWS), *SWITCHES], ids=" ".join)
def test_every_trained_parameter_of_every_row_gets_a_gradient(config, overrides):
    model = built(config(*overrides))
    images, targets = batch()
    sum(model.losses(images, targets, torch.Generator().manual_seed(0)).values()).backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert trained == reached
    assert {name for name in trained if name.startswith(("backbone.stages.stem", "backbone.stages.c2."))} == set()


SCRATCH = ("backbone.weights=none", "backbone.freeze_at=0", "backbone.frozen_bn=false")


@pytest.mark.parametrize("backbone", ["small", "resnet18"])
def test_rows_share_the_weights_that_they_share_by_name_and_shape(config, backbone):
    rows = {row: built(config(f"ablation={row}", f"backbone={backbone}", *SCRATCH)).state_dict() for row in ROWS}
    reference = rows["fpn"]
    for row, state in rows.items():
        shared = {n for n in state if n in reference and state[n].shape == reference[n].shape}
        assert {n for n in state if n.startswith("backbone.")} <= shared, row
        assert all(torch.equal(state[n], reference[n]) for n in shared), row


def test_another_seed_gives_other_weights_and_the_global_generator_none(config):
    cfg = config(*SCRATCH, "neck.upsample=deconv")
    torch.manual_seed(1)
    first = built(cfg).state_dict()
    torch.manual_seed(2)
    again, other = built(cfg).state_dict(), built(cfg, seed=1).state_dict()
    drawn = [n for n, value in first.items() if value.dim() > 1]
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not any(torch.equal(first[n], other[n]) for n in drawn)
    assert len({float(first[n].flatten()[0]) for n in drawn}) == len(drawn)  # no two parts start alike


def test_initial_distributions(config):
    """Detectron's: Gaussian 0.01 in the RPN, Xavier in the neck; biases 0."""
    state = built(config("neck.channels=64")).state_dict()
    assert float(state["rpn.head.conv.weight"].std()) == pytest.approx(0.01, rel=0.1)
    lateral = state["neck.lateral.p5.weight"]
    assert float(lateral.abs().max()) == pytest.approx((6 / (lateral.shape[0] + lateral.shape[1])) ** 0.5, rel=0.05)
    smooth = state["neck.smooth.p2.weight"]
    assert float(smooth.abs().max()) == pytest.approx((6 / (9 * (64 + 64))) ** 0.5, rel=0.05)
    assert not any(value.any() for name, value in state.items() if name.endswith("bias") and not name.startswith("backbone"))


def test_normalised_images_have_imagenets_statistics_inside_and_0_outside():
    images = torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8)
    sizes = torch.tensor([[8, 12], [5, 7]])
    x = normalise(images, sizes)
    expected = (images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(x[0], expected[0])
    torch.testing.assert_close(x[1, :, :5, :7], expected[1, :, :5, :7])
    assert not x[1, :, 5:].any()
    assert not x[1, :, :, 7:].any()


def test_what_lies_in_the_padding_does_not_matter(config):
    model = built(config()).eval()
    images, targets = batch()
    other = images.clone()
    other[1, :, :, 64 - 9 :] = 255
    a, b = (model.propose(x, targets.sizes) for x in (images, other))
    assert torch.equal(a.boxes, b.boxes)
    assert torch.equal(a.scores, b.scores)


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


def test_the_verifiers_cost_is_that_of_the_convolutions_by_hand(config):
    """2 per multiply-add: outputs x inputs per output, for the neck's and the head's share of the row."""
    wide, narrow = (row_facts(config(f"neck.channels={c}")) for c in (64, 32))
    cells = [50 * 63, 25 * 32]
    cells = [200 * 250, 100 * 125, *cells]
    p6 = 13 * 16

    def cost(d):
        lateral = sum(n * c * d for n, c in zip(cells, (24, 48, 96, 192), strict=True))
        smooth = sum(cells) * 9 * d * d
        head = (sum(cells) + p6) * (9 * d * d + 15 * d)
        return 2 * (lateral + smooth + head) / 1e9

    assert wide.gflops - narrow.gflops == pytest.approx(cost(64) - cost(32), abs=0.02)


def test_numbers_of_the_head_come_from_the_configuration(config):
    cfg = config(
        "head.samples=7",
        "head.positive_fraction=0.25",
        "head.positive_iou=0.6",
        "head.negative_iou=0.2",
        "head.nms_thresh=0.5",
        "head.pre_nms_topk=[11,12]",
        "head.pre_nms_topk_single=[13,14]",
        "head.post_nms_topk=[15,16]",
        "head.anchor_ratios=[1,3]",
    )
    s = rpn_settings(cfg, 800)
    assert (s.samples, s.positive_fraction, s.positive_iou, s.negative_iou, s.nms_thresh) == (7, 0.25, 0.6, 0.2, 0.5)
    assert (s.pre_nms_topk, s.pre_nms_topk_single, s.post_nms_topk) == ((11, 12), (13, 14), (15, 16))
    assert s.ratios == (1, 3)

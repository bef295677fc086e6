"""The RPN's losses and proposals, against slow references: image by image, anchor by anchor."""

import math

import pytest
import torch
from parts import rpn_config
from torchvision.ops import box_iou, nms

from fpn_ablate.model import boxes
from fpn_ablate.model.anchors import flatten_cells
from fpn_ablate.model.build import build_detector
from fpn_ablate.model.heads.rpn import RPN, RPNHead
from fpn_ablate.model.matching import POSITIVE, match, sample
from fpn_ablate.model.ops.rpn import FastRPN, SparseRPN
from fpn_ablate.structures.instances import Targets
from fpn_ablate.structures.levels import Level

LEVELS = tuple(Level(f"p{k}", 8) for k in (3, 4, 5))
SIDES = (64, 96)
UNFROZEN = ("backbone.freeze_at=0", "backbone.frozen_bn=false")
CONFIG = {
    **{"anchor_sizes": (12, 24, 48), "samples": 40},
    **{"pre_nms_topk": (60, 30), "pre_nms_topk_single": (100, 50), "post_nms_topk": (50, 20)},
}


def rpn(levels=LEVELS, kind=RPN, **keys):
    model = kind(levels, rpn_config(**CONFIG | keys))
    for number, p in enumerate(model.parameters()):
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(number))
    return model


def maps(model, images=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {lv.name: torch.randn(images, 8, *(s // lv.stride for s in SIDES), generator=generator) for lv in model.levels}


def raw(model, images=3, seed=0):
    return model(maps(model, images, seed))


def targets(images=3):
    """Images of different sizes; the second without any object, the third with a crowd."""
    gt = torch.zeros(images, 3, 4)
    gt[0, :2] = torch.tensor([[5.0, 5, 20, 18], [30, 10, 80, 50]])
    gt[2, :2] = torch.tensor([[40.0, 30, 52, 44], [0, 0, 60, 30]])
    valid, crowd = torch.zeros(images, 3, dtype=torch.bool), torch.zeros(images, 3, dtype=torch.bool)
    valid[0, :2] = valid[2, 0] = True
    crowd[2, 1] = True
    return Targets(gt, valid.long(), valid, crowd, torch.tensor([[64, 96], [50, 96], [64, 70]]))


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


def slow_losses(outputs, t, config, draw):
    """The same draws; then every sampled anchor by itself, with plain mathematics."""
    every = torch.cat(outputs[2])
    matched_idxs, labels = match(every, t.boxes, t.valid, t.crowd, config.positive_iou, config.negative_iou)
    idxs, sampled_mask = sample(labels, config.samples, config.positive_fraction, draw)
    logits, deltas = torch.cat(outputs[0], 1).detach(), torch.cat(outputs[1], 1).detach()
    objectness = box = count = 0
    for n in range(len(labels)):
        for r in idxs[n][sampled_mask[n]].tolist():
            count += 1
            p = 1 / (1 + math.exp(-float(logits[n, r])))
            positive = int(labels[n, r]) == POSITIVE
            objectness -= math.log(p if positive else 1 - p)
            if positive:
                target = boxes.encode(t.boxes[n, matched_idxs[n, r]], every[r])
                for x in (deltas[n, r] - target).abs().tolist():
                    beta = config.box_loss_beta
                    box += 0.5 * x * x / beta if x < beta else x - 0.5 * beta
    return {"rpn_objectness": objectness / count, "rpn_box": box / count}


def test_two_scores_an_anchor_are_a_softmax_and_relu_is_a_switch():
    features = {"p3": torch.randn(2, 8, 4, 6, generator=generator())}
    plain, two, linear = RPNHead(8, 3), RPNHead(8, 3, scores=2), RPNHead(8, 3, relu=False)
    linear.load_state_dict(plain.state_dict())
    assert not torch.allclose(plain(features)[0][0], linear(features)[0][0])
    scores = flatten_cells(two.objectness(two.conv(features["p3"]).relu()), 2).softmax(-1)[..., 1]
    torch.testing.assert_close(two(features)[0][0].sigmoid(), scores)


def test_the_walkthroughs_shapes_are_those_that_its_text_prints(config):
    cfg = config("ablation=walkthrough", "recipe.channels=256", "backbone.weights=none", *UNFROZEN)
    with torch.device("meta"):
        model = build_detector(cfg)
        levels = model.neck(model.backbone(torch.empty(2, 3, 224, 224)))
        for x, side in zip(levels.values(), (56, 28, 14, 7), strict=True):
            assert x.shape == (2, 256, side, side)
            hidden = model.rpn.head.conv(x)
            assert model.rpn.head.objectness(hidden).shape == (2, 6, side, side)
            assert model.rpn.head.deltas(hidden).shape == (2, 12, side, side)
    assert list(model.neck.smooth) == ["p2", "p3", "p4"]
    parameters = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (model.neck, model.rpn)]
    assert parameters == pytest.approx([2.75, 0.59], abs=0.01)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("levels", [LEVELS, LEVELS[:1]])
def test_losses_are_those_of_a_slow_loop_over_the_same_draws(seed, levels):
    model = rpn(levels=levels)
    outputs, t = raw(model), targets()
    losses = model.losses(maps(model), t, generator(seed))
    expected = slow_losses(outputs, t, model.config, generator(seed))
    assert expected["rpn_box"] > 0
    for name, value in expected.items():
        assert float(losses[name].detach()) == pytest.approx(value, rel=1e-5), name
    assert losses.keys() == expected.keys()


def test_positives_beyond_their_quota_count_for_nothing():
    """Room for all anchors, but for one positive an image alone."""
    model = rpn(samples=10**6, positive_fraction=1e-6)
    outputs, t = raw(model), targets()
    every = torch.cat(outputs[2])
    assert (match(every, t.boxes, t.valid, t.crowd, 0.7, 0.3)[1] == POSITIVE).sum(1).max() > 1
    losses = model.losses(maps(model), t, generator())
    for name, value in slow_losses(outputs, t, model.config, generator()).items():
        assert float(losses[name].detach()) == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("room", [0, 2])
def test_without_any_object_the_box_loss_is_0_and_everything_has_a_finite_gradient(room):
    model = rpn()
    nothing = torch.zeros(3, room, dtype=torch.bool)
    losses = model.losses(
        maps(model), Targets(torch.zeros(3, room, 4), nothing.long(), nothing, nothing, targets().sizes), generator()
    )
    assert float(losses["rpn_box"].detach()) == 0
    assert losses["rpn_objectness"] > 0
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_gradients_are_finite_where_some_images_have_only_padding():
    model = rpn()
    sum(model.losses(maps(model), targets(), generator()).values()).backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in model.parameters())


def test_nothing_to_sample_gives_losses_of_0():
    """One crowd over everything: all anchors inside are ignored."""
    model = rpn(anchor_sizes=(4, 4, 4))
    t = Targets(
        torch.tensor([[[-99.0, -99, 999, 999]]]),
        torch.tensor([[1]]),
        torch.tensor([[False]]),
        torch.tensor([[True]]),
        torch.tensor([[64, 96]]),
    )
    losses = model.losses(maps(model, images=1), t, generator())
    assert {name: float(value.detach()) for name, value in losses.items()} == {"rpn_objectness": 0, "rpn_box": 0}


@pytest.mark.parametrize("levels", [LEVELS, LEVELS[:1]])
def test_predictions_at_some_anchors_are_those_over_all_of_them_gradients_included(levels):
    """Every anchor of every image, in any order and some of them twice: corners and borders of each map among them."""
    dense, sparse = {}, {}
    for results, kind in ((dense, RPN), (sparse, SparseRPN)):
        model = rpn(levels, kind)
        features = {k: x.requires_grad_() for k, x in maps(model).items()}
        every = sum(x.shape[-2] * x.shape[-1] for x in features.values()) * model.head.objectness.out_channels
        idxs = torch.stack([torch.randperm(every, generator=generator(n)) for n in range(3)])
        idxs = torch.cat([idxs, idxs[:, :7]], 1)
        score, delta = model.predict_at(features, idxs)
        shares = torch.linspace(-1, 1, idxs.shape[1])
        ((score * shares).sum() + (delta.cos() * shares[:, None]).sum()).backward()
        results |= {"score": score, "delta": delta} | {k: x.grad for k, x in features.items()}
        results |= {name: p.grad for name, p in model.named_parameters()}
    for name, value in dense.items():
        torch.testing.assert_close(sparse[name], value, rtol=1e-4, atol=1e-5, msg=name)


# -------------------------------------------------------------------------------------------------------------- proposals


def slow_proposals(outputs, n, size, config, mode):
    """Sec. 4.1 with Detectron's numbers for one image, box by box."""
    kept = []
    for objectness, deltas, anchors in zip(*outputs, strict=True):
        pre = (config.pre_nms_topk_single if len(outputs[0]) == 1 else config.pre_nms_topk)[mode]
        order = sorted(range(len(anchors)), key=(-objectness[n].detach()).tolist().__getitem__)[:pre]
        level = []
        for r in order:
            x1, y1, x2, y2 = boxes.decode(deltas[n, r], anchors[r]).tolist()
            x1, x2 = (min(max(v, 0), float(size[1])) for v in (x1, x2))
            y1, y2 = (min(max(v, 0), float(size[0])) for v in (y1, y2))
            if x2 <= x1 or y2 <= y1:
                continue
            box = torch.tensor([[x1, y1, x2, y2]])
            if all(float(box_iou(box, other)) <= config.nms_thresh for other, _ in level):
                level.append((box, float(objectness[n, r].detach())))
        kept += level
    kept.sort(key=lambda pair: -pair[1])
    kept = kept[: config.post_nms_topk[mode]]
    return torch.cat([b for b, _ in kept]), torch.tensor([s for _, s in kept]).sigmoid()


@pytest.mark.parametrize("to_train", [True, False])
@pytest.mark.parametrize("levels", [LEVELS, LEVELS[:1]])
@pytest.mark.parametrize("nms_thresh", [0.7, 0.2])
def test_proposals_are_those_of_a_slow_loop(to_train, levels, nms_thresh):
    """`to_train` decides how many proposals there are, not the mode that the modules are in."""
    model = rpn(levels, nms_thresh=nms_thresh).train(not to_train)
    outputs, sizes = raw(model), targets().sizes
    proposals = model.propose(*outputs, sizes, to_train)
    assert proposals.boxes.shape[:2] == proposals.scores.shape == proposals.valid.shape
    for n in range(3):
        box, score = slow_proposals(outputs, n, sizes[n], model.config, 0 if to_train else 1)
        valid = proposals.valid[n]
        assert not valid[len(score) :].any()
        torch.testing.assert_close(proposals.boxes[n][valid], box)
        torch.testing.assert_close(proposals.scores[n][valid], score)


def test_no_proposal_at_all_is_an_answer():
    """Deltas that shift every box out of the image: clipping leaves nothing."""
    model = rpn().eval()
    objectness, deltas, anchors = raw(model)
    away = [torch.zeros_like(d) + torch.tensor([1e4, 0, 0, 0]) for d in deltas]
    proposals = model.propose(objectness, away, anchors, targets().sizes, to_train=False)
    assert proposals.boxes.shape == (3, 0, 4)
    assert proposals.scores.shape == proposals.valid.shape == (3, 0)
    # One image with proposals among others without.
    away[1] = torch.stack([away[1][0], torch.zeros_like(away[1][1]), away[1][2]])
    proposals = model.propose(objectness, away, anchors, targets().sizes, to_train=False)
    assert proposals.valid.any(1).tolist() == [False, True, False]


def test_levels_do_not_suppress_each_other():
    """The same box on two levels stays twice (Detectron: NMS by level)."""
    model = rpn(anchor_sizes=(16, 16, 16), anchor_ratios=(1,), pre_nms_topk=(2000, 1000)).eval()
    outputs = raw(model, images=1)
    zero = [torch.zeros_like(d) for d in outputs[1]]
    low = [torch.full_like(o, -20.0) for o in outputs[0]]
    low[0][0, 0] = low[1][0, 0] = 5.0  # cell (0, 0) of both levels has its centre at pixel 0
    proposals = model.propose(low, zero, outputs[2], torch.tensor([SIDES]), to_train=False)
    assert torch.equal(proposals.boxes[0, 0], proposals.boxes[0, 1])
    assert proposals.scores[0, 1] > 0.9 > proposals.scores[0, 2]


def scattered(spread, counts=(160, 40, 7), images=3):
    """Per level objectness (N, K), deltas of 0 and anchors that overlap the more the smaller the `spread`; of few values, so
    that many anchors score alike, and a fifth of them outside the image, where clipping empties them."""
    draw, levels = generator(), []
    for count in counts:
        corner = torch.rand(count, 2, generator=draw) * spread
        corner[::5] = 1000
        box = torch.cat([corner, corner + 20 + torch.rand(count, 2, generator=draw)], 1)
        levels.append((torch.randint(0, 60, (images, count), generator=draw) / 60, torch.zeros(images, count, 4), box))
    return levels


@pytest.mark.parametrize("topk", [1, 10, 40, 200])
@pytest.mark.parametrize("spread", [5.0, 60.0])
@pytest.mark.parametrize("pre", [30, 1000])
def test_nms_that_stops_when_it_has_enough_is_nms(topk, spread, pre):
    """It tries several times where NMS suppresses nearly everything, and reads a few boxes where NMS suppresses little."""
    plain, model = (rpn(kind=kind, nms_thresh=0.5) for kind in (RPN, FastRPN))
    levels, sizes = scattered(spread), torch.tensor([[100, 100]] * 3)
    whole = plain.select(levels, sizes, pre, topk)
    for count in (1, topk, 2 * topk, 10**6):
        for (kept, values), (box, score) in zip(model._select(levels, sizes, pre, topk, count), whole, strict=True):
            assert torch.equal(values, score)
            least = values[-1] if len(values) else 0  # others that score so little are as good
            assert {tuple(row) for row in kept[values > least].tolist()} == {tuple(row) for row in box[score > least].tolist()}
            assert (kept[:, 2:] > kept[:, :2]).all()


@pytest.mark.parametrize("topk", [10, 200])
@pytest.mark.parametrize("spread", [5.0, 60.0])
def test_one_nms_an_image_is_nms_of_each_level(topk, spread):
    plain, model = (rpn(kind=kind, nms_thresh=0.5) for kind in (RPN, FastRPN))
    model.one_nms = True
    levels, sizes = scattered(spread), torch.tensor([[100, 100]] * 3)
    pairs = zip(model.select(levels, sizes, 30, topk), plain.select(levels, sizes, 30, topk), strict=True)
    for (box, values), (expected, score) in pairs:
        assert torch.equal(values, score)
        assert {tuple(row) for row in box[values > score[-1]].tolist()} == {
            tuple(row) for row in expected[score > score[-1]].tolist()
        }


def test_nms_of_each_level_by_hand():
    model, sizes = rpn(nms_thresh=0.5), torch.tensor([[100, 100]])
    levels, expected = scattered(60.0, images=1), []
    for score, _, box in levels:
        clipped = box.clamp(0, 100)
        solid = (clipped[:, 2:] > clipped[:, :2]).all(1)
        expected += score[0][solid][nms(clipped[solid], score[0][solid], 0.5)].tolist()
    ((_, values),) = model.select(levels, sizes, 1000, 1000)
    assert values.tolist() == sorted(expected, reverse=True)


def test_nms_reads_as_few_boxes_as_it_needs(monkeypatch):
    """Boxes that do not overlap: only the best are read, since the time of NMS grows with the square of their number."""
    looked_at = []
    monkeypatch.setattr("fpn_ablate.model.heads.rpn.nms", lambda box, *rest: looked_at.append(len(box)) or nms(box, *rest))
    box = torch.arange(400.0)[:, None] * 10 + torch.tensor([0, 0, 5, 5])
    still = torch.zeros(1, 200, 4)
    levels = [(torch.linspace(1, 0.5, 200)[None], still, box[::2]), (torch.linspace(0.9, 0, 200)[None], still, box[1::2])]
    rpn(kind=FastRPN).select(levels, torch.tensor([[9000, 9000]]), 200, 40)
    assert sum(looked_at) == 50

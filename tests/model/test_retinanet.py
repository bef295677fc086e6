"""RetinaNet's head: losses against slow references and closed forms, and every switch; detections against a loop over boxes."""

import copy
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from parts import dense_config
from torchvision.ops import box_iou, generalized_box_iou, nms

from fpn_ablate.model import boxes
from fpn_ablate.model.build import build_detector
from fpn_ablate.model.heads.retinanet import RetinaNetHead, focal_loss
from fpn_ablate.model.init import initialise
from fpn_ablate.model.ops.replace import variant
from fpn_ablate.model.ops.retinanet import FastRetinaNetHead
from fpn_ablate.model.optimise import optimise
from fpn_ablate.model.summary import row_facts
from fpn_ablate.structures.instances import Targets
from fpn_ablate.structures.levels import Level

LEVELS = tuple(Level(f"p{k}", 8) for k in (4, 5))
SIDES, CLASSES = (61, 95), 3
SMALL = {"anchor_sizes": (20, 40), "convolutions": 1, "score_thresh": 0.3, "pre_nms_topk": 90, "proposals": 30}


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


def head(levels=LEVELS, std=0.2, **keys):
    model = RetinaNetHead(levels, dense_config("retinanet", **SMALL | keys), CLASSES)
    for number, p in enumerate(model.parameters()):
        torch.nn.init.normal_(p, std=std, generator=generator(number))
    return model.double()


def maps(images=3, levels=LEVELS):
    shapes = [(images, 8, *(math.ceil(side / level.stride) for side in SIDES)) for level in levels]
    return {level.name: torch.randn(s, generator=generator()).double() for level, s in zip(levels, shapes, strict=True)}


def targets():
    """Two objects, of which no anchor reaches the first; none; two and a crowd. No anchor lies just half in the crowd."""
    gt = torch.zeros(3, 3, 4).double()
    gt[0, :2] = torch.tensor([[2.0, 20, 90, 26], [30, 10, 71, 50]])
    gt[2] = torch.tensor([[41.0, 30, 51, 44], [1, 1, 41, 39], [60, 20, 84, 45]])
    valid, crowd = torch.zeros(3, 3, dtype=torch.bool), torch.zeros(3, 3, dtype=torch.bool)
    valid[0, :2] = valid[2] = True
    valid[2, 1], crowd[2, 1] = False, True
    labels = torch.tensor([[1, 3, 0], [0, 0, 0], [2, 0, 3]])
    return Targets(gt, labels, valid, crowd, torch.tensor([[61, 95], [50, 95], [61, 70]]))


def by_hand(config, anchors, t, n):
    """Labels (R,) of an image's anchors, -1 ignored and 0 background, and the objects' boxes (R, 4)."""
    gt, classes = t.boxes[n][t.valid[n]], t.labels[n][t.valid[n]]
    labels, matched = [], []
    overlap = box_iou(anchors, gt) if len(gt) else torch.zeros(len(anchors), 0)
    crowds = t.boxes[n][t.crowd[n]]
    for r, anchor in enumerate(anchors):
        best, of = (overlap[r].max(0)) if len(gt) else (torch.tensor(0.0), 0)
        low = len(gt) and any(overlap[r, g] == overlap[:, g].max() > 0 for g in range(len(gt)))
        if config.unreached == "negative" and best < config.negative_iou:
            low = False
        inside = any(2 * boxes.intersection(anchor[None], c[None]) >= boxes.area(anchor) for c in crowds)
        label = 0 if best < config.negative_iou and not inside else -1
        labels.append(int(classes[of]) if best >= config.positive_iou or low else label)
        matched.append(gt[of] if len(gt) else anchor)
    return torch.tensor(labels), torch.stack(matched)


def slow_losses(model, features, t):
    """The sums of the losses of each image, and its number of positives, one anchor and class after the other."""
    config, anchors = model.config, torch.cat(model.anchors(features)).double()
    logits, deltas = (torch.cat(column, 1) for column in model(features))
    sums, counts = [], []
    for n in range(len(t.sizes)):
        labels, matched = by_hand(config, anchors, t, n)
        classes = box = torch.zeros(()).double()
        for r in (labels >= 0).nonzero()[:, 0].tolist():
            for k in range(CLASSES):
                p = logits[n, r, k].sigmoid()
                p_t, alpha = (p, config.alpha) if labels[r] == k + 1 else (1 - p, 1 - config.alpha)
                weight = 1 if config.loss == "ce" else alpha
                classes = classes - weight * (1 - p_t) ** (config.gamma if config.loss == "focal" else 0) * p_t.log()
        for r in (labels > 0).nonzero()[:, 0].tolist():
            if config.box_loss == "giou":
                box = box + 1 - generalized_box_iou(boxes.decode(deltas[n, r], anchors[r])[None], matched[r][None])[0, 0]
            else:
                beta = config.box_loss_beta if config.box_loss == "smooth_l1" else 0
                target = boxes.encode(matched[r], anchors[r])
                box = box + F.smooth_l1_loss(deltas[n, r], target, beta=beta, reduction="sum")
        sums.append(torch.stack([classes, box]))
        counts.append(int((labels > 0).sum()))
    return torch.stack(sums), torch.tensor(counts)


def losses(model, features, t):
    return model.losses(features, t, generator())


# ------------------------------------------------------------------------------------------------------------ closed forms


def test_without_gamma_and_with_equal_weights_the_focal_loss_is_half_the_cross_entropy():
    logits = torch.randn(50, generator=generator()).double() * 9
    target = torch.arange(50) % 3 == 0
    expected = F.binary_cross_entropy_with_logits(logits, target.double(), reduction="none")
    torch.testing.assert_close(focal_loss(logits, target, 0.5, 0), expected / 2)
    torch.testing.assert_close(focal_loss(logits, target, None, 0), expected)


def test_at_the_start_a_positive_costs_1_128_and_a_negative_next_to_nothing(config):
    model = build_detector(config("ablation=retinanet/focal"), num_classes=CLASSES)
    initialise(model, 0)
    features = {level.name: torch.zeros(1, level.channels, 4, 4) for level in model.neck.levels}
    logits = torch.cat(model.head(features)[0], 1)
    torch.testing.assert_close(logits.sigmoid(), torch.full_like(logits, 0.01))
    both = focal_loss(logits[0, 0, :2], torch.tensor([True, False]), 0.25, 2.0)
    assert both.tolist() == pytest.approx([1.128, 7.5e-7], rel=0.006)


def test_anchors_of_an_image_of_800_by_1000_and_the_heads_share_of_the_cost(config):
    facts = row_facts(config("ablation=retinanet/focal", "recipe=retinanet2017", "backbone=small", "backbone.weights=shipped"))
    assert (facts.anchors, facts.head, facts.proposals, facts.gflops_rpn) == (150426, "retinanet", "", 0)
    assert facts.gflops_head == pytest.approx(2 * 110, rel=0.05)  # 110 GMAC at 800 x 1024
    assert row_facts(config("ablation=retinanet/one_anchor")).anchors * 9 == 150426


@pytest.mark.parametrize("init", ["gaussian", "he"])
def test_the_subnets_start_is_the_papers_or_keeps_the_size_of_activations(config, init):
    model = build_detector(config("ablation=retinanet/focal", f"task.init={init}"), num_classes=CLASSES)
    initialise(model, 0)
    convs = [subnet[0][0].weight for subnet in (model.head.class_subnet, model.head.box_subnet)]
    expected = 0.01 if init == "gaussian" else (2 / convs[0][0].numel()) ** 0.5
    assert [float(w.detach().std()) for w in convs] == pytest.approx([expected] * 2, rel=0.05)
    assert float(model.head.deltas.weight.detach().std()) == pytest.approx(0.01, rel=0.05)


# ------------------------------------------------------------------------------------------------------------------ losses

VARIANTS = (
    {},
    {"loss": "ce", "unreached": "negative"},
    {"loss": "balanced_ce", "alpha": 0.75, "box_loss": "smooth_l1", "positive_iou": 0.3, "negative_iou": 0.2},
    {"gamma": 0.5, "box_loss": "giou", "norm": "gn"},
)


@pytest.mark.parametrize("keys", VARIANTS)
def test_losses_are_those_of_a_loop_over_anchors_and_classes(keys):
    model, features, t = head(**keys), maps(), targets()
    with torch.no_grad():
        sums, counts = slow_losses(model, features, t)
    assert counts[1] == 0 and counts[0] > 0 and counts[2] > 0
    normalised = {
        "batch": sums.sum(0) / counts.sum(),
        "image": (sums / counts.clamp(min=1)[:, None]).mean(0),
        "moving": sums.sum(0) / (0.9 * 100 + 0.1 * counts.sum()),
    }
    for normaliser, expected in normalised.items():
        model = head(**keys, normaliser=normaliser)
        torch.testing.assert_close(torch.stack(list(losses(model, features, t).values())), expected, rtol=1e-6, atol=0)


def test_the_moving_average_is_kept_with_the_weights():
    model, features, t = head(normaliser="moving"), maps(), targets()
    first, second = (losses(model, features, t)["class"].item() for _ in range(2))
    count = 10 * (float(model.state_dict()["moving_positives"]) - 0.9 * (0.9 * 100 + 0.1 * 0)) / 1.9
    assert first * (90 + 0.1 * count) == pytest.approx(second * (81 + 0.19 * count))
    assert "moving_positives" not in head().state_dict()


SWITCHES = {
    "loss": ("ce", "balanced_ce", "ohem"),
    "alpha": (0.5,),
    "gamma": (0.0,),
    "unreached": ("negative",),
    "box_loss": ("smooth_l1", "giou"),
    "box_loss_weight": (0.25,),
    "normaliser": ("image", "moving"),
    "positive_iou": (0.7,),
    "negative_iou": (0.2,),
    "norm": ("gn",),
    "convolutions": (2,),
    "anchor_scales": (2,),
    "anchor_ratios": ((1.0,),),
    "anchor_grid": ("torchvision",),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in SWITCHES.items() for value in values])
def test_a_switch_changes_the_losses(key, value):
    plain, changed = (losses(head(**keys), maps(), targets()) for keys in ({}, {key: value}))
    assert sum(plain.values()).item() != pytest.approx(sum(changed.values()).item(), rel=1e-6)


@pytest.mark.parametrize(
    "keys",
    [{"ohem_samples": 7}, {"ohem_nms_thresh": 0.1}, {"ohem_negatives": 1.0}, {"box_loss": "smooth_l1", "box_loss_beta": 1.0}],
)
def test_a_key_of_a_loss_changes_it(keys):
    base = {"loss": "ohem"} | {key: value for key, value in keys.items() if key == "box_loss"}
    plain, changed = (losses(head(**more), maps(), targets()) for more in (base, base | keys))
    assert sum(plain.values()).item() != pytest.approx(sum(changed.values()).item(), rel=1e-6)


@pytest.mark.parametrize("ratio", [None, 3.0])
def test_ohem_trains_on_the_hardest_anchors_that_nms_leaves(ratio):
    model, features, t = head(loss="ohem", ohem_samples=20, ohem_negatives=ratio), maps(), targets()
    anchors = torch.cat(model.anchors(features)).double()
    logits = torch.cat(model(features)[0], 1)
    chosen = []
    for n in range(3):
        labels, _ = by_hand(model.config, anchors, t, n)
        target = F.one_hot(labels.clamp(min=0), CLASSES + 1)[:, 1:].double()
        loss = F.binary_cross_entropy_with_logits(logits[n], target, reduction="none").sum(1)
        used = (labels >= 0).nonzero()[:, 0]
        kept = used[nms(anchors[used], loss[used], 0.5)]
        positives, negatives, taken = int((labels[kept] > 0).sum()), 0, []
        for r in kept.tolist():
            negatives += int(labels[r] == 0)
            if ratio is None or labels[r] > 0 or negatives <= ratio * max(positives, 1):
                taken.append(loss[r])
        chosen += taken[:20]
    assert losses(model, features, t)["class"].item() == pytest.approx(float(torch.stack(chosen).mean().detach()))


@pytest.mark.parametrize("loss", ["focal", "ohem"])
@pytest.mark.parametrize("box_loss", ["l1", "giou"])
def test_a_batch_without_objects_has_gradients_and_no_positives(loss, box_loss):
    model, t = head(loss=loss, box_loss=box_loss), targets()
    nothing = torch.zeros_like(t.valid)
    for g in (3, 0):
        empty = Targets(t.boxes[:, :g], t.labels[:, :g], nothing[:, :g], nothing[:, :g], t.sizes)
        out = losses(model, maps(), empty)
        assert out["box"] == 0 and out["class"] > 0 and torch.isfinite(out["class"])
        sum(out.values()).backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("keys", [{}, {"norm": "gn", "box_loss": "giou"}, {"loss": "ohem"}])
def test_every_parameter_has_a_gradient(keys):
    model = head(**keys)
    sum(losses(model, maps(), targets()).values()).backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in model.parameters())


# -------------------------------------------------------------------------------------------------------------- detections


def reference(model, features, sizes, n, by_class):
    """Detections of an image: (score, label, box), one level and box after the other; or proposals."""
    found = []
    for logits, deltas, anchors in zip(*model(features), model.anchors(features), strict=True):
        scores = logits[n].sigmoid()
        pairs = (
            [(float(scores[r, k]), k + 1, r) for r in range(len(scores)) for k in range(CLASSES)]
            if by_class
            else [(float(scores[r].max()), 1, r) for r in range(len(scores))]
        )
        for score, label, r in sorted(pairs, reverse=True)[: model.config.pre_nms_topk]:
            box = boxes.clip(boxes.decode(deltas[n, r], anchors[r].double())[None, None], sizes[n : n + 1])[0, 0]
            if (score > model.config.score_thresh or not by_class) and boxes.area(box) > 0:
                found.append((score, label, box))
    thresh, topk = (0.5, model.config.detections) if by_class else (0.7, model.config.proposals)
    kept = []
    for label in range(1, CLASSES + 1):
        own = [d for d in found if d[1] == label]
        if own:
            keep = nms(torch.stack([box for *_, box in own]), torch.tensor([s for s, *_ in own]).double(), thresh)
            kept += [own[i] for i in keep.tolist()]
    return sorted(kept, key=lambda d: -d[0])[:topk]


@torch.no_grad()
@pytest.mark.parametrize("by_class", [True, False], ids=["detections", "proposals"])
def test_detections_and_proposals_are_those_of_a_loop_over_boxes(by_class):
    model, features, sizes = head(std=0.1, detections=900), maps(), targets().sizes
    out = model.detect(features, sizes) if by_class else model.propose(features, sizes)
    counts = []
    for n in range(3):
        expected, keep = reference(model, features, sizes, n, by_class), out.valid[n]
        counts.append(len(expected))
        torch.testing.assert_close(out.scores[n][keep], torch.tensor([s for s, *_ in expected]).double())
        torch.testing.assert_close(out.boxes[n][keep], torch.stack([box for *_, box in expected]), rtol=0, atol=1e-5)
        if by_class:
            assert out.labels[n][keep].tolist() == [label for _, label, _ in expected]
        assert all(a >= b for a, b in pairwise(out.scores[n][keep].tolist())) and not out.scores[n][~keep].any()
    assert max(counts) > 20 and len(set(counts)) > (1 if by_class else 0)


@pytest.mark.parametrize("key, value", [("score_thresh", 0.6), ("pre_nms_topk", 5), ("nms_thresh", 0.1), ("detections", 4)])
@torch.no_grad()
def test_a_key_of_the_detections_changes_them(key, value):
    features, sizes = maps(), targets().sizes
    counts = [int(head(std=0.1, **keys).detect(features, sizes).valid.sum()) for keys in ({}, {key: value})]
    assert 0 < counts[1] < counts[0]


@torch.no_grad()
def test_nothing_above_the_threshold_is_no_detection():
    out = head(score_thresh=1.0).detect(maps(), targets().sizes)
    assert out.boxes.shape == (3, 0, 4) and out.valid.shape == out.labels.shape == (3, 0)


@pytest.mark.parametrize("keys", [*VARIANTS, {"loss": "ohem"}])
def test_the_faster_loss_has_the_same_values_and_gradients(keys):
    plain, t = head(**keys), targets()
    fast = variant(copy.deepcopy(plain), FastRetinaNetHead)
    for model in (plain, fast):
        sum(losses(model, maps(), t).values()).backward()
    torch.testing.assert_close(losses(plain, maps(), t), losses(fast, maps(), t))
    for a, b in zip(plain.parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_the_faster_modules_detect_the_same(config):
    cfg = config("ablation=retinanet/focal", "backbone.weights=pretrain", "task.init=he", "task.score_thresh=0.0")
    plain = build_detector(cfg, num_classes=CLASSES)
    initialise(plain, 0)
    fast = optimise(copy.deepcopy(plain), torch.device("cpu"))
    assert type(fast.head) is FastRetinaNetHead and type(fast.head.scores) is not type(plain.head.scores)
    images = torch.rand(3, 3, 64, 96, generator=generator()) * 255
    a, b = (model.eval().detect(images, targets().sizes) for model in (plain, fast))
    torch.testing.assert_close(a.scores, b.scores, rtol=1e-4, atol=1e-6)


def test_a_single_map_has_the_anchors_of_all_sizes():
    model = head(levels=(Level("c4", 8),))
    with torch.no_grad():
        logits, deltas = model(maps(levels=(Level("c4", 8),)))
    assert logits[0].shape == (3, 4 * 6 * 18, CLASSES) and deltas[0].shape == (3, 4 * 6 * 18, 4)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_a_logit_that_is_certainly_right_has_no_gradient(gamma):
    logits = torch.tensor([-120.0, -90.0, 120.0], requires_grad=True)
    focal_loss(logits, torch.tensor([False, False, True]), 0.25, gamma).sum().backward()
    assert torch.equal(logits.grad, torch.zeros(3))

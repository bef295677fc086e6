"""The second stage: its outputs, losses and detections against torchvision's, its samples against counting."""

import math

import pytest
import torch
import torch.nn.functional as F
from parts import roi_config
from torch import nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads as TorchvisionRoIHeads
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.ops import MultiScaleRoIAlign, box_iou

from fpn_ablate.model import boxes
from fpn_ablate.model.heads.box_head import TwoFC
from fpn_ablate.model.heads.roi import RoIHeads
from fpn_ablate.model.heads.roi_pooler import RoIPooler
from fpn_ablate.structures.instances import Proposals, Targets
from fpn_ablate.structures.levels import Level

PYRAMID = tuple(Level(f"p{k}", 4) for k in range(2, 7))
HEIGHT, WIDTH = 256, 320
SHAPES = [(256, 320), (150, 200), (256, 170), (40, 320)]  # the first fills the batch
CANONICAL = 72.0  # so that boxes in these images meet every level


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def maps(images=1):
    g = generator()
    return {lv.name: torch.randn(images, lv.channels, HEIGHT // lv.stride, WIDTH // lv.stride, generator=g) for lv in PYRAMID}


def heads(num_classes=5, std=0.3, **keys):
    """Weights that are not all alike, and large enough for scores of every size."""
    pooler = RoIPooler(PYRAMID, 7, canonical_box_size=CANONICAL)
    model = RoIHeads(pooler, TwoFC(4, 7, 16), num_classes, roi_config(**keys))
    for number, p in enumerate(model.parameters()):
        nn.init.normal_(p, std=std, generator=generator(number))
    return model


def boxes_in(shape, number, g):
    """Sides from 4 pixels to the image's own, all inside the image."""
    limit = torch.tensor([shape[1], shape[0]]) - 1.0
    size = 4 * (limit / 4) ** torch.rand(number, 2, generator=g)
    corner = torch.rand(number, 2, generator=g) * (limit - size)
    return torch.cat([corner, corner + size], -1)


def padded(rows, width=4):
    most = max(len(row) for row in rows)
    table = torch.stack([F.pad(row, (0, 0) * (row.dim() - 1) + (0, most - len(row))) for row in rows])
    return table, torch.stack([torch.arange(most) < len(row) for row in rows])


def scene(images=4, num_classes=5, seed=0, numbers=(60, 35, 0, 50), objects=(4, 2, 3, 0)):
    """Proposals and objects of images of different sizes. Half of the proposals lie near an object. No crowds."""
    g = generator(seed)
    gt = [boxes_in(shape, n, g) for shape, n in zip(SHAPES[:images], objects, strict=False)]
    rows = []
    for shape, image_boxes, number in zip(SHAPES, gt, numbers, strict=False):
        row = boxes_in(shape, number, g)
        if len(image_boxes) and number:
            near = image_boxes[torch.randint(len(image_boxes), (number // 2,), generator=g)]
            shift = torch.randn(len(near), 4, generator=g) * 0.08 * (near[:, 2:] - near[:, :2]).repeat(1, 2)
            row[::2][: len(near)] = boxes.clip((near + shift)[None], torch.tensor([shape]))[0]
        rows.append(row)
    labels, _ = padded([torch.randint(1, num_classes + 1, (len(image_boxes),), generator=g) for image_boxes in gt])
    gt, valid = padded(gt)
    box, real = padded(rows)
    sizes = torch.tensor(SHAPES[:images])
    return (
        Proposals(box, torch.linspace(1, 0, box.shape[1]).expand(images, -1), real),
        Targets(gt, labels, valid, torch.zeros_like(valid), sizes),
    )


def torchvisions(ours, **changes):
    """torchvision's heads with the weights of ours. Its predictor has deltas for the background too, which nobody reads."""
    s, k = ours.config, ours.predictor.scores.out_features - 1
    pool = MultiScaleRoIAlign(["p2", "p3", "p4", "p5"], 7, 2, canonical_scale=CANONICAL)
    head, predictor = TwoMLPHead(4 * 7 * 7, 16), FastRCNNPredictor(16, k + 1)
    head.load_state_dict(ours.box_head.state_dict())
    predictor.cls_score.load_state_dict(ours.predictor.scores.state_dict())
    with torch.no_grad():
        predictor.bbox_pred.weight[4:] = ours.predictor.deltas.weight
        predictor.bbox_pred.bias[4:] = ours.predictor.deltas.bias
    values = {"samples": s.samples, "fraction": s.positive_fraction, **changes}
    return TorchvisionRoIHeads(
        pool,
        head,
        predictor,
        s.positive_iou,
        s.positive_iou,
        values["samples"],
        values["fraction"],
        s.box_weights,
        s.score_thresh,
        s.nms_thresh,
        s.detections,
    )


def rows_of(proposals):
    return [box[valid] for box, valid in zip(proposals.boxes, proposals.valid, strict=True)]


def dicts_of(t):
    return [{"boxes": b[v], "labels": k[v]} for b, k, v in zip(t.boxes, t.labels, t.valid, strict=True)]


# --------------------------------------------------------------------------------------------------------------- outputs


# ---------------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("images", [1, 4])
@pytest.mark.parametrize("num_classes", [1, 5])
@pytest.mark.parametrize("weights", [(10, 10, 5, 5), (1, 2, 3, 4)])
def test_losses_and_gradients_are_torchvisions_for_the_same_samples(images, num_classes, weights):
    """Drawn by ours: a quarter positives and padding among the RoIs that are not."""
    model = heads(num_classes, samples=40, box_loss_beta=1 / 9, box_weights=weights)
    proposals, targets = scene(images, num_classes)
    rois, labels, matched_idxs, sampled_mask = model.sample(proposals, targets, generator())
    assert (labels[sampled_mask] > 0).any()
    assert images == 1 or not sampled_mask.all()
    features = maps(images)
    ours = model.losses(features, proposals, targets, generator())
    sum(ours.values()).backward()

    theirs = torchvisions(model)
    drawn = [roi[c] for roi, c in zip(rois, sampled_mask, strict=True)]
    matched = [t[m[c]] for t, m, c in zip(targets.boxes, matched_idxs, sampled_mask, strict=True)]
    # What a negative's target would be is no matter, and a padded object (of no size) would be none.
    matched = [torch.where(k[c][:, None] > 0, m, r) for m, k, c, r in zip(matched, labels, sampled_mask, drawn, strict=True)]
    scores, deltas = theirs.box_predictor(theirs.box_head(theirs.box_roi_pool(features, drawn, SHAPES[:images])))
    target = theirs.box_coder.encode(matched, drawn)
    expected = fastrcnn_loss(scores, deltas, [k[c] for k, c in zip(labels, sampled_mask, strict=True)], target)
    sum(expected).backward()
    torch.testing.assert_close(torch.stack(list(ours.values())), torch.stack(expected), rtol=1e-5, atol=1e-5)
    assert list(ours) == ["roi_class", "roi_box"]
    pairs = [*zip(model.box_head.parameters(), theirs.box_head.parameters(), strict=True)]
    pairs += zip(model.predictor.scores.parameters(), theirs.box_predictor.cls_score.parameters(), strict=True)
    for mine, other in pairs:
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)
    for mine, other in zip(model.predictor.deltas.parameters(), theirs.box_predictor.bbox_pred.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad[4:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("images", [1, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_losses_are_torchvisions_from_matching_on_where_everything_is_drawn(images, seed):
    """With room for all RoIs nothing is left to chance: matching, labels, the objects among the RoIs, both losses."""
    model = heads(samples=1000, positive_fraction=1.0, box_loss_beta=1 / 9)
    proposals, targets = scene(images, seed=seed)
    ours = model.losses(maps(images), proposals, targets, generator())
    theirs = torchvisions(model).train()
    _, expected = theirs(maps(images), rows_of(proposals), SHAPES[:images], dicts_of(targets))
    torch.testing.assert_close(ours["roi_class"], expected["loss_classifier"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours["roi_box"], expected["loss_box_reg"], rtol=1e-5, atol=1e-5)
    assert ours["roi_box"] > 0


@pytest.mark.parametrize("beta", [1.0, 0.0, 0.25])
def test_losses_by_hand(beta):
    """Two RoIs of one image: a positive of class 2 whose deltas are off by 0.5 and 2, and a negative; a third is padding."""
    model = heads(3, box_loss_beta=beta)
    roi = torch.tensor([[[0.0, 0, 10, 10], [20, 20, 30, 30], [0, 0, 0, 0]]])
    deltas = torch.full((1, 3, 3, 4), 99.0)
    deltas[0, 0, 1] = torch.tensor([10 + 0.5, 0 - 2.0, 0, 5 * math.log(2)])
    scores = torch.tensor([[[0.0, 1, 2, 3], [1, 0, 0, 0], [9, 9, 9, 9]]], requires_grad=True)
    sampled_mask, labels = torch.tensor([[True, True, False]]), torch.tensor([[2, 0, 1]])
    gt = torch.tensor([[[50.0, 50, 60, 60], [10, -5, 20, 15]]])  # the second: as wide as the RoI, twice as high
    losses = model.losses_of(scores, deltas, roi, labels, torch.tensor([[1, 0, 0]]), sampled_mask, gt)
    wrong = [x - 0.5 * beta if x >= beta else 0.5 * x * x / beta for x in (0.5, 2.0)]
    assert float(losses["roi_box"]) == pytest.approx(sum(wrong) / 2, rel=1e-5)
    likely = math.exp(2) / sum(math.exp(v) for v in range(4)), math.e / (math.e + 3)
    assert float(losses["roi_class"].detach()) == pytest.approx(-sum(map(math.log, likely)) / 2, rel=1e-5)


def test_rois_that_are_not_chosen_count_for_nothing_and_have_no_gradient():
    model, (proposals, targets) = heads(samples=200), scene()
    rois, labels, matched_idxs, sampled_mask = model.sample(proposals, targets, generator())
    assert (~sampled_mask & (rois == 0).all(-1)).any()  # padding, whose targets are no numbers
    scores, deltas = (x.detach().requires_grad_() for x in model(maps(4), rois))
    losses = model.losses_of(scores, deltas, rois, labels, matched_idxs, sampled_mask, targets.boxes)
    sum(losses.values()).backward()
    assert torch.isfinite(deltas.grad).all()
    assert not scores.grad[~sampled_mask].any()
    assert not deltas.grad[~sampled_mask].any()
    assert scores.grad[sampled_mask].any(-1).all()


@pytest.mark.parametrize("room", [0, 2])
@pytest.mark.parametrize("number", [0, 30])
def test_no_object_in_any_image(room, number):
    """And no proposal either: losses and gradients are numbers, the same whether there is padding for objects or not."""
    model = heads(samples=20)
    proposals, _ = scene(2, numbers=(number, number // 2))
    nothing = torch.zeros(2, room, dtype=torch.bool)
    t = Targets(torch.zeros(2, room, 4), nothing.long(), nothing, nothing, torch.tensor(SHAPES[:2]))
    losses = model.losses(maps(2), proposals, t, generator())
    assert float(losses["roi_box"].detach()) == 0
    assert (losses["roi_class"] > 0) == (number > 0)
    sum(losses.values()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert not model.predictor.deltas.weight.grad.any()


# --------------------------------------------------------------------------------------------------------------- samples


def with_crowd(targets):
    """Make all objects of the first image but one, and all of the third, crowd regions; one of them lies around that object."""
    targets.boxes[0, 1] = targets.boxes[0, 0] + torch.tensor([0, 0, 0.5, 0.5])
    crowd = targets.valid.clone()
    crowd[[1, 3]] = False
    crowd[0, 0] = False
    return Targets(targets.boxes, targets.labels, targets.valid & ~crowd, crowd, targets.sizes)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("samples", "fraction"), [(16, 0.25), (16, 1.0), (40, 0.25), (1000, 0.25)])
def test_samples_are_what_the_rule_says_roi_by_roi(seed, samples, fraction):
    model = heads(samples=samples, positive_fraction=fraction, proposals=(50, 7))
    proposals, targets = scene(seed=seed, numbers=(80, 35, 20, 50))
    targets = with_crowd(targets)
    rois, labels, matched_idxs, sampled_mask = model.sample(proposals, targets, generator(seed))
    assert rois.shape == (*labels.shape, 4)
    assert labels.shape == matched_idxs.shape == sampled_mask.shape
    for n in range(4):
        objects, kinds = targets.boxes[n][targets.valid[n]], targets.labels[n][targets.valid[n]]
        places = targets.valid[n].nonzero()[:, 0]
        candidates = torch.cat([proposals.boxes[n, :50][proposals.valid[n, :50]], objects])
        expected = []  # (box, label, object)
        for box in candidates:
            overlap = box_iou(box[None], objects)[0]
            if len(objects) and overlap.max() >= 0.5:
                expected.append((box, int(kinds[overlap.argmax()]), int(places[overlap.argmax()])))
                continue
            x1, y1, x2, y2 = box.tolist()
            inside = 0.0
            for a1, b1, a2, b2 in targets.boxes[n][targets.crowd[n]].tolist():
                inside = max(inside, max(0, min(x2, a2) - max(x1, a1)) * max(0, min(y2, b2) - max(y1, b1)))
            if inside < 0.5 * (x2 - x1) * (y2 - y1):
                expected.append((box, 0, None))
        table = {tuple(box.tolist()): (label, place) for box, label, place in expected}
        drawn = [tuple(box) for box in rois[n][sampled_mask[n]].tolist()]
        assert len(set(drawn)) == len(drawn)
        columns = labels[n][sampled_mask[n]].tolist(), matched_idxs[n][sampled_mask[n]].tolist()
        for box, label, place in zip(drawn, *columns, strict=True):
            assert label == table[box][0]
            assert label == 0 or place == table[box][1]
        positives = sum(label > 0 for label, _ in table.values())
        negatives = len(table) - positives
        drawn_positives = min(positives, int(samples * fraction))
        assert int((labels[n][sampled_mask[n]] > 0).sum()) == drawn_positives
        assert len(drawn) == drawn_positives + min(negatives, samples - drawn_positives)


def test_the_objects_themselves_are_among_the_candidates():
    """Without any proposal, and with proposals that lie nowhere near."""
    _, targets = scene(objects=(4, 2, 3, 1))
    nothing = Proposals(torch.zeros(4, 0, 4), torch.zeros(4, 0), torch.zeros(4, 0, dtype=torch.bool))
    rois, labels, _, sampled_mask = heads(samples=100, positive_fraction=1.0).sample(nothing, targets, generator())
    for n in range(4):
        real = targets.valid[n]
        drawn = sorted(map(tuple, rois[n][sampled_mask[n]].tolist()))
        assert drawn == sorted(map(tuple, targets.boxes[n][real].tolist()))
        assert sorted(labels[n][sampled_mask[n]].tolist()) == sorted(targets.labels[n][real].tolist())


# ------------------------------------------------------------------------------------------------------------ detections


def found_in(detections, n):
    v = detections.valid[n]
    return detections.boxes[n][v], detections.scores[n][v], detections.labels[n][v]


@pytest.mark.parametrize("images", [1, 4])
@pytest.mark.parametrize(("num_classes", "most"), [(1, 100), (5, 100), (5, 20), (30, 100)])
def test_detections_are_torchvisions(images, num_classes, most):
    """Whole: pooling, heads, decoding, clipping, threshold, NMS, limit. It drops boxes under 0.01 pixels, ours of no size;
    here there are none between."""
    model = heads(num_classes, std=0.25, detections=most).eval()
    proposals, targets = scene(images, numbers=(200, 120, 0, 150))
    theirs = torchvisions(model).eval()
    with torch.no_grad():
        expected, _ = theirs(maps(images), rows_of(proposals), SHAPES[:images])
    ours = model.detect(maps(images), proposals, targets.sizes)
    for n, other in enumerate(expected):
        box, score, label = found_in(ours, n)
        assert torch.equal(label, other["labels"])
        torch.testing.assert_close(score, other["scores"], rtol=0, atol=1e-4)
        torch.testing.assert_close(box, other["boxes"], rtol=0, atol=1e-4)
    assert len(expected[0]["labels"]) > 10
    assert num_classes == 1 or len(expected[0]["labels"].unique()) > 2


class Answering(RoIHeads):
    """Heads that give the boxes and scores that a test plants: deltas 0, so each RoI is its own box in every class."""

    def __init__(self, probability, **keys):
        k = probability.shape[-1]
        super().__init__(RoIPooler(PYRAMID, 7), TwoFC(4, 7, 16), k, roi_config(**keys))
        rest = 1 - probability.sum(-1, keepdim=True)
        self.logits = torch.cat([rest, probability], -1).clamp(min=1e-12).log()

    def forward(self, features, rois):
        number = rois.shape[1]
        return self.logits[:, :number], torch.zeros(*rois.shape[:2], self.logits.shape[-1] - 1, 4)


def detect(rois, probability, valid=None, size=(100, 100), **keys):
    rois, probability = torch.tensor(rois), torch.tensor(probability)
    valid = torch.ones(rois.shape[:2], dtype=torch.bool) if valid is None else torch.tensor(valid)
    model = Answering(probability, **keys)
    return model.detect({}, Proposals(rois, torch.ones(rois.shape[:2]), valid), torch.tensor([size] * len(rois)))


BOX, NEAR, FAR = [10.0, 10, 50, 50], [10.0, 10, 50, 48], [60.0, 60, 90, 90]


def test_a_box_suppresses_its_neighbour_of_the_same_class_in_the_same_image_alone():
    d = detect([[BOX, NEAR], [NEAR, FAR]], [[[0.6, 0.2], [0.5, 0.3]], [[0.7, 0.06], [0.06, 0.6]]])
    box, score, label = found_in(d, 0)
    assert box.tolist() == [BOX, NEAR]
    assert label.tolist() == [1, 2]
    torch.testing.assert_close(score, torch.tensor([0.6, 0.3]))
    box, score, label = found_in(d, 1)
    assert (label.tolist(), box.tolist()) == ([1, 2, 1, 2], [NEAR, FAR, FAR, NEAR])
    torch.testing.assert_close(score, torch.tensor([0.7, 0.6, 0.06, 0.06]))


@pytest.mark.parametrize(("threshold", "left"), [(0.5, 1), (0.96, 2)])
def test_the_nms_threshold(threshold, left):
    assert int(detect([[BOX, NEAR]], [[[0.6], [0.5]]], nms_thresh=threshold).valid.sum()) == left  # their IoU is 0.95


@pytest.mark.parametrize(("threshold", "left"), [(0.05, [0.3, 0.2]), (0.2999, [0.3]), (0.25, [0.3]), (0.5, [])])
def test_the_score_threshold(threshold, left):
    d = detect([[BOX, FAR]], [[[0.2], [0.3]]], score_thresh=threshold)
    torch.testing.assert_close(found_in(d, 0)[1], torch.tensor(left))


def test_at_most_so_many_detections_an_image_and_the_best_of_them_first():
    grid = [[[20.0 * i, 0, 20.0 * i + 10, 10] for i in range(5)]] * 2
    scores = [[[0.1], [0.5], [0.3], [0.2], [0.4]], [[0.01], [0.3], [0.01], [0.01], [0.2]]]
    d = detect(grid, scores, detections=3)
    assert d.boxes.shape == (2, 3, 4)
    torch.testing.assert_close(found_in(d, 0)[1], torch.tensor([0.5, 0.4, 0.3]))
    torch.testing.assert_close(found_in(d, 1)[1], torch.tensor([0.3, 0.2]))
    assert found_in(d, 0)[0][:, 0].tolist() == [20, 80, 40]
    assert d.valid.tolist() == [[True] * 3, [True, True, False]]
    assert not d.labels[~d.valid].any()


def test_padding_proposals_and_those_beyond_the_best_yield_nothing():
    d = detect([[BOX, FAR]], [[[0.6], [0.9]]], valid=[[True, False]])
    assert found_in(d, 0)[0].tolist() == [BOX]
    d = detect([[BOX, FAR]], [[[0.6], [0.9]]], proposals=(2, 1))
    assert found_in(d, 0)[0].tolist() == [BOX]


def test_boxes_are_cut_to_their_image_and_what_is_left_of_none_is_dropped():
    d = detect([[[80.0, -5, 130, 30], [110, 10, 150, 30]]], [[[0.5], [0.6]]], size=(20, 100))
    assert found_in(d, 0)[0].tolist() == [[80, 0, 100, 20]]


@pytest.mark.parametrize("number", [0, 3])
def test_no_detection_at_all_is_an_answer(number):
    model = heads(5, score_thresh=1.0).eval()
    proposals = Proposals(torch.rand(2, number, 4), torch.ones(2, number), torch.ones(2, number, dtype=torch.bool))
    d = model.detect(maps(2), proposals, torch.tensor(SHAPES[:2]))
    assert d.boxes.shape == (2, 0, 4)
    assert d.scores.shape == d.labels.shape == d.valid.shape == (2, 0)
    assert (d.labels.dtype, d.valid.dtype) == (torch.int64, torch.bool)


def test_adaptive_feature_pooling_is_the_maximum_over_levels_behind_the_first_layer():
    pooler, features = RoIPooler(PYRAMID, 7, canonical_box_size=CANONICAL, all_levels=True), maps(2)
    head = TwoFC(4, 7, 16, views=4)
    rois = torch.stack([boxes_in((256, 320), 9, generator(n)) for n in range(2)])
    levels = [RoIPooler([level], 7)({level.name: features[level.name]}, rois) for level in PYRAMID[:4]]  # P6 is the RPN's alone
    hidden = torch.stack([head.fc6(x.flatten(1)).relu() for x in levels]).amax(0)
    torch.testing.assert_close(head(pooler(features, rois)), head.fc7(hidden).relu())


def test_detections_of_a_batch_are_those_of_its_images():
    """Many boxes, so that NMS is asked for in its other way (torchvision takes classes one by one from 1,000 boxes on)."""
    model, (proposals, targets) = heads(8, std=0.15).eval(), scene(numbers=(300, 200, 0, 250))
    together = model.detect(maps(4), proposals, targets.sizes)
    for n in range(4):
        image_proposals = Proposals(*(x[n : n + 1] for x in (proposals.boxes, proposals.scores, proposals.valid)))
        alone = model.detect({k: x[n : n + 1] for k, x in maps(4).items()}, image_proposals, targets.sizes[n : n + 1])
        for mine, other in zip(found_in(together, n), found_in(alone, 0), strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-4)

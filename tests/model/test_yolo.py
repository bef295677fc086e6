"""YOLOv3's priors, their match with objects, and the gradients of its losses, against slow references and by hand."""

import math

import pytest
import torch
from parts import dense_config

from fpn_ablate.model.heads.yolo import YOLOHead, decode, encode, match, spread
from fpn_ablate.model.matching import IGNORED, NEGATIVE, POSITIVE
from fpn_ablate.structures.instances import Targets
from fpn_ablate.structures.levels import Level

PUBLISHED = ((10, 13), (16, 30), (33, 23), (30, 61), (62, 45), (59, 119), (116, 90), (156, 198), (373, 326))


def head(levels=(3, 4, 5), short_side=416, classes=3, **keys):
    return YOLOHead([Level(f"p{k}", 4) for k in levels], dense_config("yolo", **keys), classes, short_side)


def maps(model, images=1, sides=(100, 131)):
    return {level.name: torch.zeros(images, 4, *(math.ceil(side / level.stride) for side in sides)) for level in model.levels}


def targets():
    """The second image has none; the third a crowd, and three objects that one prior fits best."""
    gt = torch.tensor(
        [
            [[8.0, 9, 20, 24], [20, 20, 80, 70], [90, 60, 131, 100], [0, 0, 131, 100]],
            [[0, 0, 0, 0]] * 4,
            [[40, 40, 50, 53], [41, 39, 52, 53], [40, 40, 50, 53], [60, 0, 131, 50]],
        ]
    )
    valid, crowd = torch.ones(3, 4, dtype=torch.bool), torch.zeros(3, 4, dtype=torch.bool)
    valid[1], valid[2, 3], crowd[2, 3] = False, False, True
    labels = torch.tensor([[1, 2, 3, 1], [0, 0, 0, 0], [1, 2, 3, 1]])
    return Targets(gt, labels, valid, crowd, torch.tensor([[100, 131]] * 3))


def test_published_priors_stay_and_other_numbers_are_read_between_them():
    torch.testing.assert_close(spread(PUBLISHED[::-1], 9), torch.tensor(PUBLISHED).float())
    torch.testing.assert_close(spread(PUBLISHED, 5), torch.tensor(PUBLISHED[::2]).float())
    torch.testing.assert_close(spread(PUBLISHED, 1), torch.tensor(PUBLISHED[4:5]).float())
    between = spread(PUBLISHED, 17)[1::2]
    torch.testing.assert_close(between, (torch.tensor(PUBLISHED[1:]).float() * torch.tensor(PUBLISHED[:-1])).sqrt())
    torch.testing.assert_close(spread([(4, 9)], 2), torch.tensor([[4.0, 9], [4, 9]]))


def test_the_finest_level_has_the_smallest_priors_scaled_to_the_input():
    for short_side in (416, 208):
        model = head(short_side=short_side)
        priors = model.priors(maps(model))
        sides = priors.boxes[:, 2:] - priors.boxes[:, :2]
        for k in range(3):
            expected = torch.tensor(PUBLISHED[3 * k : 3 * k + 3]) * short_side / 416
            torch.testing.assert_close(sides[priors.first[k] : priors.first[k] + 3], expected)
        centers = (priors.boxes[:, 2:] + priors.boxes[:, :2]) / 2
        assert centers[0].tolist() == [4, 4] and centers[-1].tolist() == [4.5 * 32, 3.5 * 32]


@pytest.mark.usefixtures("at_once_and_image_by_image")
@pytest.mark.parametrize("ignore_iou", [0.3, 0.5])
def test_matches_are_those_of_a_loop_over_objects_and_priors(ignore_iou):
    model, t = head((3, 4, 5)), targets()
    priors = model.priors(maps(model))
    for predicted in (None, priors.boxes.flip(0).expand(3, -1, -1)):
        matched_idxs, labels = match(priors, t.boxes, t.valid, t.crowd, ignore_iou, predicted)
        for n in range(3):
            expected, owner = loop(priors, t, n, ignore_iou, priors.boxes if predicted is None else predicted[n])
            assert labels[n].tolist() == expected
            assert {r: int(matched_idxs[n, r]) for r in owner} == owner
    assert (labels == POSITIVE).sum(1).tolist() == [4, 0, 1]


def iou(a, b):
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    shared = max(width, 0) * max(height, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def loop(priors, t, n, ignore_iou, candidates):
    """Labels of an image's priors, and {positive prior: its object}, of plain numbers."""
    labels, owner = [], {}
    gt = [box.tolist() for box, valid in zip(t.boxes[n], t.valid[n], strict=True) if valid]
    for candidate in candidates.tolist():
        ignored = any(iou(candidate, box) > ignore_iou for box in gt)
        for box, crowd in zip(t.boxes[n].tolist(), t.crowd[n], strict=True):
            inside = [min(candidate[i + 2], box[i + 2]) - max(candidate[i], box[i]) for i in (0, 1)]
            area = (candidate[2] - candidate[0]) * (candidate[3] - candidate[1])
            ignored |= bool(crowd) and min(inside) > 0 and 2 * inside[0] * inside[1] >= area
        labels.append(IGNORED if ignored else NEGATIVE)
    fits = {}
    for g, box in enumerate(gt):
        center, best = [(box[i] + box[i + 2]) / 2 for i in (0, 1)], (-1, None)
        for r, (prior, stride) in enumerate(zip(priors.boxes.tolist(), priors.strides.tolist(), strict=True)):
            middle = [(prior[i] + prior[i + 2]) / 2 for i in (0, 1)]
            if all(int(center[i] // stride) == int(middle[i] // stride) for i in (0, 1)):
                moved = [prior[i] - middle[i % 2] + center[i % 2] for i in range(4)]
                best = max(best, (iou(moved, box), r), key=lambda pair: pair[0])
        fit, r = best
        if r not in fits or fit > fits[r] + 1e-6:
            fits[r], owner[r] = fit, g
    for r in owner:
        labels[r] = POSITIVE
    return labels, owner


def test_boxes_are_decoded_as_they_were_encoded():
    model, t = head(), targets()
    priors = model.priors(maps(model))
    box = t.boxes[0][:, None].double()
    inside = [(priors.boxes[:, i] + priors.boxes[:, i + 2]) / 2 for i in (0, 1)]
    center = (box[..., :2] + box[..., 2:]) / 2
    near = ((center - torch.stack(inside, -1)).abs() < priors.strides[:, None] / 2).all(-1)
    place, log_sides = encode(box.expand(-1, len(priors.boxes), -1), priors.boxes.double(), priors.strides)
    assert ((place > 0) & (place < 1)).all(-1).equal(near)
    raw = torch.cat([torch.logit(place), log_sides], -1)[near]
    decoded = decode(raw, priors.boxes.expand(4, -1, -1)[near], priors.strides.expand(4, -1)[near])
    torch.testing.assert_close(decoded, box.expand(-1, len(priors.boxes), -1)[near], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("weigh_small", [True, False])
def test_the_gradient_of_a_box_is_prediction_minus_truth_small_objects_weighing_more(weigh_small, monkeypatch):
    model, t = head(weigh_small=weigh_small), targets()
    t = Targets(t.boxes[:1], t.labels[:1], t.valid[:1], t.crowd[:1], t.sizes[:1])
    features = maps(model)
    raw = [[torch.randn(x.shape).requires_grad_() for x in levels] for levels in model(features)]
    monkeypatch.setattr(model, "forward", lambda _: raw)
    losses = model.losses(features, t, torch.Generator())
    losses["box"].backward()
    gradient = torch.cat([x.grad for x in raw[2]], 1)[0]
    priors = model.priors(features)
    matched_idxs, labels = match(priors, t.boxes, t.valid, t.crowd, 0.5)
    for r in (labels[0] == POSITIVE).nonzero()[:, 0].tolist():
        box = t.boxes[0, matched_idxs[0, r]]
        place, log_sides = encode(box, priors.boxes[r], priors.strides[r])
        delta = torch.cat(raw[2], 1)[0, r].detach()
        predicted = torch.cat([delta[:2].sigmoid(), delta[2:]])
        width, height = (box[2:] - box[:2]).tolist()
        weight = 2 - width * height / (100 * 131) if weigh_small else 1
        torch.testing.assert_close(gradient[r], (predicted - torch.cat([place, log_sides])) * weight / 4)
    assert gradient.any(-1).sum() == 4


def test_at_the_start_objectness_costs_what_its_prior_says():
    model = head(prior=0.01)
    features = maps(model, images=3)  # of zeros: biases alone
    for name, layer in model.objectness.items():
        model.init_parameter(layer, layer.bias, torch.Generator())
        assert layer.bias.sigmoid().tolist() == pytest.approx([0.01] * 3), name
    t = targets()
    for layer in (*model.convs, *model.scores, *model.deltas):
        assert layer in model.objectness
    _, labels = match(model.priors(features), t.boxes, t.valid, t.crowd, 0.5)
    with torch.no_grad():
        for conv in model.convs.values():
            for p in conv.parameters():
                p.zero_()
        loss = model.losses(features, t, torch.Generator())["objectness"]
    negatives = int((labels == NEGATIVE).sum())
    assert loss.item() == pytest.approx(-math.log(0.01) - negatives / 5 * math.log(0.99), rel=1e-5)

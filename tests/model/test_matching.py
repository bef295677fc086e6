"""Matching and sampling, against the paper's rule written as a loop and against counting."""

import pytest
import torch
from torchvision.ops import box_iou

from fpn_ablate.model import matching
from fpn_ablate.model.matching import IGNORED, NEGATIVE, POSITIVE, match, sample

HIGH, LOW = 0.7, 0.3


def scene(images=4, objects=5, anchors=200, seed=0):
    """Random anchors and boxes; padding and crowds among the boxes, in any place."""
    generator = torch.Generator().manual_seed(seed)

    def some(*shape):
        corner = torch.rand(*shape, 2, generator=generator) * 60
        return torch.cat([corner, corner + 4 + torch.rand(*shape, 2, generator=generator) * 40], -1)

    gt, kind = some(images, objects), torch.rand(images, objects, generator=generator)
    valid, crowd = kind < 0.6, kind > 0.8
    gt[~valid & ~crowd] = 0
    table = some(anchors)
    table[:objects] = gt[0]  # anchors that fit perfectly, some of them on padding
    return table, gt, valid, crowd


def by_the_book(anchors, gt, valid, crowd, allow_low_quality_matches=True, high=HIGH, low=LOW):
    """Sec. 4.1 for one image, anchor by anchor; for RoIs (`allow_low_quality_matches` off) the IoU alone decides."""
    real = [g for g in range(len(gt)) if valid[g]]
    labels = []
    overlap = box_iou(gt, anchors)
    for r in range(len(anchors)):
        ious = [float(overlap[g, r]) for g in real]
        highest = [g for g in real if overlap[g, r] == overlap[g].max() and overlap[g, r] > 0]
        if (allow_low_quality_matches and highest) or any(v >= high for v in ious):
            labels.append(POSITIVE)
        elif all(v < low for v in ious):
            labels.append(NEGATIVE)
        else:
            labels.append(IGNORED)
        if labels[-1] == NEGATIVE:
            x1, y1, x2, y2 = anchors[r].tolist()
            for g in [g for g in range(len(gt)) if crowd[g]]:
                a1, b1, a2, b2 = gt[g].tolist()
                inside = max(0, min(x2, a2) - max(x1, a1)) * max(0, min(y2, b2) - max(y1, b1))
                if inside >= 0.5 * (x2 - x1) * (y2 - y1):
                    labels[-1] = IGNORED
    return labels, overlap, real


@pytest.mark.parametrize("seed", range(6))
def test_matching_a_batch_is_the_papers_rule_anchor_by_anchor(seed):
    anchors, gt, valid, crowd = scene(seed=seed)
    matched_idxs, labels = match(anchors, gt, valid, crowd, HIGH, LOW)
    for n in range(len(gt)):
        expected, overlap, real = by_the_book(anchors, gt[n], valid[n], crowd[n])
        assert labels[n].tolist() == expected
        for r in (labels[n] == POSITIVE).nonzero()[:, 0].tolist():
            assert int(matched_idxs[n, r]) in real
            assert overlap[matched_idxs[n, r], r] == max(overlap[g, r] for g in real)
    assert {POSITIVE, NEGATIVE, IGNORED} == set(labels.unique().tolist())


def own_rois(images=4, seed=0):
    """Other anchors in each image."""
    return torch.stack([scene(seed=100 * (seed + 1) + n)[0] for n in range(images)])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("allow_low_quality_matches", [True, False])
def test_matching_each_images_own_rois_is_the_rule_roi_by_roi(seed, allow_low_quality_matches):
    """Faster R-CNN's second stage: RoIs (N, R, 4), 0.5 from both sides, and no low-quality matches."""
    _, gt, valid, crowd = scene(seed=seed)
    rois, high = own_rois(seed=seed), 0.5
    rois[:, :2] = gt[:, :2] + torch.tensor([0, 0, 3.0, 0])  # some objects have a good RoI, others none
    matched_idxs, labels = match(rois, gt, valid, crowd, high, high, allow_low_quality_matches)
    for n in range(len(gt)):
        expected, overlap, real = by_the_book(rois[n], gt[n], valid[n], crowd[n], allow_low_quality_matches, high, high)
        assert labels[n].tolist() == expected
        for r in (labels[n] == POSITIVE).nonzero()[:, 0].tolist():
            assert overlap[matched_idxs[n, r], r] == max(overlap[g, r] for g in real)
    assert {POSITIVE, NEGATIVE, IGNORED} == set(labels.unique().tolist())


@pytest.mark.parametrize("allow_low_quality_matches", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_matching_image_by_image_where_memory_is_short_gives_the_same(monkeypatch, shared, allow_low_quality_matches):
    table, *truth = scene(images=3, seed=1)
    arguments = (table if shared else own_rois(3), *truth, HIGH, LOW, allow_low_quality_matches)
    together = match(*arguments)
    monkeypatch.setitem(matching.MAX_PAIRS, "cpu", 0)
    assert all(torch.equal(a, b) for a, b in zip(match(*arguments), together, strict=True))


SQUARE = [0.0, 0, 10, 10]


@pytest.mark.parametrize(
    ("gt", "anchors", "expected"),
    [
        # All anchors that tie for an object are positive.
        ([10.0, 10, 20, 20], [[8.0, 10, 18, 20], [12, 10, 22, 20], [40, 40, 50, 50]], [POSITIVE, POSITIVE, NEGATIVE]),
        # An object that no anchor touches makes none positive; one with a poor best anchor keeps it.
        ([90.0, 90, 95, 95], [SQUARE, [5, 5, 20, 20]], [NEGATIVE, NEGATIVE]),
        ([0.0, 0, 4, 4], [[0.0, 0, 16, 16], [2, 2, 18, 18]], [POSITIVE, NEGATIVE]),
        # The thresholds: the first anchor fits the object, the second covers a share of it.
        *(
            (SQUARE, [SQUARE, [0, 0, 10, 10 * iou]], [POSITIVE, label])
            for iou, label in ((0.69, IGNORED), (0.71, POSITIVE), (0.31, IGNORED), (0.29, NEGATIVE))
        ),
    ],
)
def test_the_rule_by_hand_for_one_object(gt, anchors, expected):
    yes, no = torch.tensor([[True]]), torch.tensor([[False]])
    assert match(torch.tensor(anchors), torch.tensor([[gt]]), yes, no, HIGH, LOW)[1].tolist() == [expected]


@pytest.mark.parametrize("objects", [0, 3])
def test_an_image_without_objects_has_negatives_alone(objects):
    """No room for boxes at all, or room that only holds padding."""
    anchors = scene()[0]
    nothing = torch.zeros(2, objects, dtype=torch.bool)
    matched_idxs, labels = match(anchors, torch.zeros(2, objects, 4), nothing, nothing, HIGH, LOW)
    assert matched_idxs.shape == labels.shape == (2, len(anchors))
    assert (labels == NEGATIVE).all()
    assert labels.dtype == torch.int8
    assert matched_idxs.dtype == torch.int64


def test_padding_changes_nothing():
    anchors, gt, valid, crowd = scene()
    more = torch.nn.functional.pad(gt, (0, 0, 0, 3))
    labels = match(anchors, more, *(torch.nn.functional.pad(m, (0, 3)) for m in (valid, crowd)), HIGH, LOW)[1]
    assert torch.equal(labels, match(anchors, gt, valid, crowd, HIGH, LOW)[1])


def test_a_crowd_takes_negatives_out_and_leaves_positives_in():
    gt = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 40, 40]]])
    anchors = torch.tensor([[0.0, 0, 10, 10], [25, 25, 35, 35], [35, 0, 45, 10], [36, 0, 46, 10], [80, 80, 90, 90]])
    valid, crowd = torch.tensor([[True, False]]), torch.tensor([[False, True]])
    labels = match(anchors, gt, valid, crowd, HIGH, LOW)[1]
    assert labels.tolist() == [[POSITIVE, IGNORED, IGNORED, NEGATIVE, NEGATIVE]]  # the third lies in it by exactly half


# --------------------------------------------------------------------------------------------------------------- sampling


def labels_of(*counts, total=400):
    """One row for each (positives, negatives), shuffled, the rest ignored."""
    rows = []
    for seed, (positives, negatives) in enumerate(counts):
        row = torch.full((total,), IGNORED, dtype=torch.int8)
        order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
        row[order[:positives]] = POSITIVE
        row[order[positives : positives + negatives]] = NEGATIVE
        rows.append(row)
    return torch.stack(rows)


def draw(labels, count=64, fraction=0.5, seed=0):
    return sample(labels, count, fraction, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("available", "expected"),
    [
        ((100, 300), (32, 32)),  # enough of both
        ((10, 300), (10, 54)),  # few positives: negatives fill up
        ((0, 300), (0, 64)),
        ((100, 5), (32, 5)),  # few negatives: the quota of positives stays
        ((3, 4), (3, 4)),
        ((0, 0), (0, 0)),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_how_many_of_each_are_drawn(available, expected, seed):
    labels = labels_of(available, (200, 200))
    idxs, sampled_mask = draw(labels, seed=seed)
    sampled = labels[0][idxs[0][sampled_mask[0]]]
    assert (int((sampled == POSITIVE).sum()), int((sampled == NEGATIVE).sum())) == expected
    assert len(sampled) == sum(expected)  # so no ignored one is among them
    assert len(set(idxs[0][sampled_mask[0]].tolist())) == len(sampled)  # without replacement
    assert idxs.shape == sampled_mask.shape == (2, 64)
    assert idxs.dtype == torch.int64
    assert idxs.min() >= 0
    assert idxs.max() < 400


@pytest.mark.parametrize(("fraction", "positives"), [(0.0, 0), (0.25, 16), (1.0, 64)])
def test_the_fraction_of_positives(fraction, positives):
    labels = labels_of((100, 300))
    idxs, sampled_mask = draw(labels, fraction=fraction)
    assert int((labels.gather(1, idxs)[sampled_mask] == POSITIVE).sum()) == positives
    assert int(sampled_mask.sum()) == 64


def test_fewer_anchors_than_samples():
    labels = labels_of((10, 20), total=30)
    idxs, sampled_mask = draw(labels, count=1000)
    assert idxs.shape == (1, 30)
    assert sampled_mask.all()
    assert sorted(idxs[0].tolist()) == list(range(30))


def test_the_generator_alone_decides():
    labels = labels_of((100, 300), (50, 60))

    def drawn(seed):
        idxs, sampled_mask = draw(labels, seed=seed)
        return [set(i[c].tolist()) for i, c in zip(idxs, sampled_mask, strict=True)]

    torch.manual_seed(1)
    first = drawn(7)
    torch.manual_seed(2)
    assert drawn(7) == first
    assert drawn(8) != first


def test_every_candidate_is_drawn_equally_often():
    """Draw 8 of 40 positives and 8 of 60 negatives, 4,000 times: each count lies within 5 standard deviations."""
    labels = labels_of((40, 60), total=100).expand(4000, -1)
    idxs, sampled_mask = draw(labels, count=16)
    times = torch.zeros(4000, 100).scatter_add_(1, idxs, sampled_mask.float()).sum(0)
    for kind, number in ((POSITIVE, 40), (NEGATIVE, 60)):
        share = 8 / number
        deviation = (4000 * share * (1 - share)) ** 0.5
        assert ((times[labels[0] == kind] - 4000 * share).abs() < 5 * deviation).all()

"""FCOS's locations, their match with objects and centerness; the whole detector is in test_torchvision_fcos.py."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from parts import dense_config
from torchvision.models.detection.fcos import FCOS

from fpn_ablate.model.heads.fcos import FCOSHead, boxes_at, centerness, distances, match
from fpn_ablate.model.matching import IGNORED, NEGATIVE, POSITIVE
from fpn_ablate.structures.levels import Level


def head(levels=range(3, 8), short_side=800, **keys):
    return FCOSHead([Level(f"p{k}", 8) for k in levels], dense_config("fcos", convolutions=1, **keys), 3, short_side)


def maps(model, sides=(200, 300)):
    return {level.name: torch.zeros(1, 8, *(math.ceil(side / level.stride) for side in sides)) for level in model.levels}


def objects():
    """Three images: nine objects; none; four."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(3, 9, 2, generator=generator, dtype=torch.float64) * 240
    side = (torch.rand(3, 9, 2, generator=generator, dtype=torch.float64) * 3.5).exp() * 4
    valid = torch.ones(3, 9, dtype=torch.bool)
    valid[1], valid[2, 4:] = False, False
    return torch.cat([corner, corner + side], -1), valid, torch.zeros_like(valid)


def test_a_level_learns_distances_of_four_to_eight_strides_at_800_px():
    for levels, ends in ((range(3, 8), [64, 128, 256, 512]), (range(2, 7), [32, 64, 128, 256]), ([4], [])):
        for short_side in (800, 400):
            model = head(levels, short_side)
            locations = model.locations(maps(model))
            expected = [0, *(end * short_side / 800 for end in ends), math.inf]
            ranges = list(dict.fromkeys(map(tuple, locations.ranges.tolist())))
            assert ranges == list(pairwise(expected))
            assert len(locations.points) == sum(x[0, 0].numel() for x in maps(model).values())


def test_locations_lie_where_the_core_has_its_anchors_or_in_the_middle_of_their_cells():
    for points, offset in (("exact", 0), ("center", 0.5), ("torchvision", 0)):
        model = head(points=points)
        locations = model.locations(maps(model, (104, 200)))
        finest = locations.points[locations.strides == 8]
        assert finest[0].tolist() == [8 * offset] * 2 and finest[-1].tolist() == [8 * (24 + offset), 8 * (12 + offset)]
        coarser = locations.points[locations.strides == 16]  # 7 x 13 cells of 104 x 200 px
        across, down = (15, 14) if points == "torchvision" else (16, 16)  # whole strides
        assert coarser[-1].tolist() == [across * 12 + 16 * offset, down * 6 + 16 * offset]


@pytest.mark.usefixtures("at_once_and_image_by_image")
@pytest.mark.parametrize("radius", [1.5, 0.8])
def test_matches_are_torchvisions(radius):
    (gt_boxes, valid, crowd), model, caught = objects(), head(), []
    locations = model.locations(maps(model))
    half = locations.strides[:, None] / 2
    squares = torch.cat([locations.points - half, locations.points + half], 1).double()
    counts = [int((locations.strides == level.stride).sum()) for level in model.levels]
    theirs = SimpleNamespace(center_sampling_radius=radius, head=SimpleNamespace(compute_loss=lambda *a: caught.extend(a[3])))
    FCOS.compute_loss(theirs, [{"boxes": b[v]} for b, v in zip(gt_boxes, valid, strict=True)], None, [squares] * 3, counts)
    matched_idxs, labels = match(locations, gt_boxes, valid, crowd, radius)
    for n, expected in enumerate(caught):
        assert torch.equal(torch.where(labels[n] == POSITIVE, matched_idxs[n], -1), expected)
    assert (labels == POSITIVE).sum(1).tolist()[1] == 0 and (labels == POSITIVE).sum() > 10


def test_without_centre_sampling_all_of_the_box_is_positive_and_the_smallest_object_wins():
    model = head([4])
    locations = model.locations(maps(model, (160, 160)))
    gt_boxes = torch.tensor([[[0.0, 0, 160, 160], [30, 30, 70, 70], [100, 20, 150, 60]]])
    valid, crowd = torch.tensor([[True, True, False]]), torch.tensor([[False, False, True]])
    matched_idxs, labels = match(locations, gt_boxes, valid, crowd, None)
    x, y = locations.points.unbind(-1)
    inner = (x > 30) & (x < 70) & (y > 30) & (y < 70)
    assert torch.equal(labels[0] == POSITIVE, (x > 0) & (y > 0)) and torch.equal(matched_idxs[0] == 1, inner)
    _, labels = match(locations, gt_boxes[:, 1:], valid[:, 1:], crowd[:, 1:], None)
    in_crowd = (x > 100) & (x < 150) & (y > 20) & (y < 60)
    assert torch.equal(labels[0] == POSITIVE, inner) and torch.equal(labels[0] == IGNORED, in_crowd)
    assert (labels[0] == NEGATIVE).sum() == len(x) - inner.sum() - in_crowd.sum()


def test_distances_and_centerness_by_hand():
    box = torch.tensor([10.0, 20, 50, 100])
    points = torch.tensor([[30.0, 60], [20, 60], [10, 60], [20, 40]])
    assert distances(points, box.expand(4, 4)).tolist()[1] == [10, 40, 30, 40]
    assert centerness(distances(points, box.expand(4, 4))).tolist() == pytest.approx([1, 3**-0.5, 0, 3**-1])
    assert torch.equal(boxes_at(points, distances(points, box.expand(4, 4))), box.expand(4, 4))

"""RoI pooling: which level a RoI reads (Eq. 1), that it reads it at its own place, and that the order of RoIs is kept."""

import math

import pytest
import torch
from torchvision.ops import MultiScaleRoIAlign, RoIPool, roi_align

from fpn_ablate.model.heads.roi_pooler import RoIPooler, roi_level
from fpn_ablate.structures.levels import Level

PYRAMID = tuple(Level(f"p{k}", 4) for k in range(2, 7))
HEIGHT, WIDTH = 512, 640


def square(side):
    return [30.0, 40.0, 30 + side, 40 + side]


def maps(images=1, levels=PYRAMID, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        lv.name: torch.randn(images, lv.channels, HEIGHT // lv.stride, WIDTH // lv.stride, generator=generator) for lv in levels
    }


def some_rois(images, number, seed=0):
    """Sides of 4 to 800 pixels, evenly in the logarithm, so that every level has some; many reach outside the image."""
    generator = torch.Generator().manual_seed(seed)
    size = 4 * 200 ** torch.rand(images, number, 2, generator=generator)
    corner = torch.rand(images, number, 2, generator=generator) * torch.tensor([WIDTH, HEIGHT]) - size / 4
    return torch.cat([corner, corner + size], -1)


def level_by_hand(box, canonical=224.0):
    x1, y1, x2, y2 = box.tolist()
    return min(max(math.floor(4 + math.log2(math.sqrt((x2 - x1) * (y2 - y1)) / canonical)), 2), 5)


# ----------------------------------------------------------------------------------------------------------------- Eq. 1


@pytest.mark.parametrize(
    ("side", "level"), [(55.9, 1), (56, 2), (111.9, 2), (112, 3), (223.9, 3), (224, 4), (447.9, 4), (448, 5), (896, 6)]
)
def test_equation_1(side, level):
    """k = floor(4 + log2(sqrt(w h) / 224)), by the size alone: neither the place nor the shape of a box matters."""
    assert int(roi_level(torch.tensor(square(side)))) == level
    wide = torch.tensor([0, 0, side * 2, side / 2])
    assert int(roi_level(wide)) == level


@pytest.mark.parametrize(("level", "size"), [(4, 224), (3, 224), (4, 224 * 256 / 800)])
def test_both_numbers_of_equation_1_are_switches(level, size):
    at, below = (torch.tensor([0, 0, size * f, size * f]) for f in (1, 0.999))
    assert int(roi_level(at, level, size)) == level
    assert int(roi_level(below, level, size)) == level - 1


def test_a_box_of_exactly_the_size_is_on_the_upper_side_wherever_it_lies():
    """Rounding of its corners must not decide. 71.68: 224 pixels at a short side of 256."""
    corner = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0)) * 60
    for power in (-1, 0, 1):
        boxes = torch.cat([corner, corner + 71.68 * 2**power], -1)
        assert (roi_level(boxes, 4, 71.68) == 4 + power).all()


def test_the_pooler_asks_with_its_own_numbers():
    boxes = torch.tensor([square(side) for side in (20, 51, 101, 201)])
    assert RoIPooler(PYRAMID, 7, canonical_level=3, canonical_box_size=100).assign(boxes).tolist() == [0, 0, 1, 2]
    assert RoIPooler(PYRAMID, 7, canonical_level=4, canonical_box_size=100).assign(boxes).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("side", "expected"), [(0, "p2"), (3, "p2"), (111.9, "p2"), (112, "p3"), (224, "p4"), (448, "p5"), (5000, "p5")]
)
def test_levels_end_at_p2_and_p5(side, expected):
    pooler = RoIPooler(PYRAMID, 7)
    assert pooler.levels[int(pooler.assign(torch.tensor(square(side))))].name == expected


def test_every_level_of_a_shorter_pyramid_has_its_own_place():
    """Levels are told by their names, not by how many there are."""
    pooler = RoIPooler(PYRAMID[1:3], 7)
    sides = torch.tensor([square(side) for side in (50, 120, 230, 450)])
    assert [pooler.levels[i].name for i in pooler.assign(sides).tolist()] == ["p3", "p3", "p4", "p4"]


@pytest.mark.parametrize("canonical", [224.0, 71.68])
def test_each_roi_reads_one_level_and_it_is_that_of_equation_1(canonical):
    """Maps that hold the number of their level everywhere, and P6 nothing that could be read unseen."""
    features = {lv.name: torch.full((2, 1, 400, 400), float(lv.name[1])) for lv in PYRAMID}
    features["p6"].fill_(math.nan)
    boxes = some_rois(2, 100).clamp(min=0)  # inside all maps
    pooled = RoIPooler(PYRAMID, 3, canonical_box_size=canonical)(features, boxes)
    expected = torch.tensor([float(level_by_hand(box, canonical)) for box in boxes.flatten(0, 1)])
    assert set(expected.tolist()) == {2, 3, 4, 5}
    torch.testing.assert_close(pooled, expected.view(-1, 1, 1, 1).expand(-1, -1, 3, 3))


def test_a_gradient_goes_to_the_level_that_was_read_alone():
    for side, name in ((30, "p2"), (120, "p3"), (250, "p4"), (450, "p5")):
        features = {k: x.requires_grad_() for k, x in maps(2).items()}
        boxes = torch.tensor([[square(side)]] * 2)
        RoIPooler(PYRAMID, 2)(features, boxes).sum().backward()
        assert {k for k, x in features.items() if x.grad is not None and x.grad.any()} == {name}


# ------------------------------------------------------------------------------------------------------ place and order


@pytest.mark.parametrize("pooling", ["align", "pool"])
def test_the_order_of_rois_is_kept(pooling):
    features, boxes = maps(2), some_rois(2, 80)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(1))
    pooler = RoIPooler(PYRAMID, 3, pooling)
    pooled = pooler(features, boxes).unflatten(0, (2, 80))
    assert torch.equal(pooler(features, boxes[:, order]).unflatten(0, (2, 80)), pooled[:, order])


@pytest.mark.parametrize("sides", [(300,), (20, 500), (20, 20)])
def test_levels_without_rois_are_fine(sides):
    features, boxes = maps(2), torch.tensor([[square(side) for side in sides]] * 2)
    pooled = RoIPooler(PYRAMID, 3)(features, boxes).unflatten(0, boxes.shape[:2])
    for i in range(len(sides)):
        alone = RoIPooler(PYRAMID, 3)(features, boxes[:, i : i + 1])
        assert torch.equal(pooled[:, i], alone)


@pytest.mark.parametrize("levels", [PYRAMID, PYRAMID[2:3]])
@pytest.mark.parametrize("pooling", ["align", "pool"])
def test_no_roi_at_all_is_fine(levels, pooling):
    features = {k: x.requires_grad_() for k, x in maps(2).items()}
    pooled = RoIPooler(levels, 7, pooling)(features, torch.zeros(2, 0, 4))
    assert pooled.shape == (0, 4, 7, 7)
    pooled.sum().backward()


@pytest.mark.parametrize("pooling", ["align", "pool"])
def test_padding_boxes_give_finite_numbers_and_change_no_other(pooling):
    features, boxes = maps(2), some_rois(2, 20)
    for x in features.values():
        x.requires_grad_()
    padded = torch.cat([boxes, torch.zeros(2, 5, 4)], 1)
    pooler = RoIPooler(PYRAMID, 3, pooling)
    pooled = pooler(features, padded).unflatten(0, (2, 25))
    assert torch.equal(pooled[:, :20], pooler(features, boxes).unflatten(0, (2, 20)))
    pooled.sum().backward()
    assert torch.isfinite(pooled).all()
    assert all(torch.isfinite(x.grad).all() for name, x in features.items() if name != "p6")


# ------------------------------------------------------------------------------------------------- torchvision's results


@pytest.mark.parametrize("sampling_ratio", [2, 1, 0])
@pytest.mark.parametrize("images", [1, 4])
def test_roi_align_is_torchvisions_multi_scale_one(images, sampling_ratio):
    """Images of different sizes, of which the largest fills the batch."""
    features, boxes = maps(images), some_rois(images, 50)
    shapes = [(HEIGHT, WIDTH), (300, 400), (512, 333), (77, 640)][:images]
    theirs = MultiScaleRoIAlign(["p2", "p3", "p4", "p5"], 7, sampling_ratio)
    expected = theirs(features, list(boxes), shapes)
    ours = RoIPooler(PYRAMID, 7, "align", sampling_ratio)(features, boxes)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("images", [1, 4])
def test_roi_pool_is_torchvisions_roi_by_roi(images):
    features, boxes = maps(images), some_rois(images, 30)
    ours = RoIPooler(PYRAMID, 7, "pool")(features, boxes).unflatten(0, (images, 30))
    for n in range(images):
        for box, pooled in zip(boxes[n], ours[n], strict=True):
            k = level_by_hand(box)
            assert torch.equal(pooled, RoIPool(7, 1 / 2**k)(features[f"p{k}"][n : n + 1], [box[None]])[0])


@pytest.mark.parametrize("level", [Level("c4", 6), Level("c5", 6), Level("p2", 6), Level("p5", 6)])
@pytest.mark.parametrize("resolution", [7, 14])
def test_a_single_level_reads_its_own_map_whatever_the_size(level, resolution):
    features, boxes = maps(2, [level]), some_rois(2, 20)
    pooler = RoIPooler([level], resolution)
    expected = roi_align(features[level.name], list(boxes), resolution, 1 / level.stride, 2)
    assert pooler.in_channels == 6
    assert not pooler.assign(boxes).any()
    torch.testing.assert_close(pooler(features, boxes), expected)


def test_maps_in_bf16_are_pooled_in_fp32():
    features, boxes = maps(1), some_rois(1, 20)
    low = {k: x.bfloat16() for k, x in features.items()}
    pooled = RoIPooler(PYRAMID, 3)(low, boxes)
    assert pooled.dtype == torch.float32
    assert torch.equal(pooled, RoIPooler(PYRAMID, 3)({k: x.float() for k, x in low.items()}, boxes))

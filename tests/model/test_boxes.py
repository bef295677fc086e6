"""Box arithmetic against torchvision and against itself."""

import math

import pytest
import torch
from torchvision.ops import box_iou, clip_boxes_to_image

from fpn_ablate.model import boxes


def random_boxes(*shape, seed=0, low=1.0, high=100.0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(*shape, 2, generator=generator) * 200 - 50
    return torch.cat([corner, corner + low + torch.rand(*shape, 2, generator=generator) * (high - low)], -1)


def test_iou_is_torchvisions_for_each_image_of_a_batch():
    a, b = random_boxes(3, 7), random_boxes(3, 11, seed=1)
    expected = torch.stack([box_iou(x, y) for x, y in zip(a, b, strict=True)])
    torch.testing.assert_close(boxes.iou(a, b), expected)
    torch.testing.assert_close(boxes.iou(a, b[0]), torch.stack([box_iou(x, b[0]) for x in a]))


def test_iou_of_touching_equal_nested_and_empty_boxes():
    box = torch.tensor([[0.0, 0, 10, 10]])
    others = torch.tensor([[10.0, 0, 20, 10], [0, 0, 10, 10], [0, 0, 5, 10], [3, 3, 3, 3], [20, 20, 30, 30]])
    assert boxes.iou(box, others).tolist() == [[0, 1, 0.5, 0, 0]]
    padding = torch.zeros(2, 4)
    assert boxes.iou(padding, padding).tolist() == [[0, 0], [0, 0]]


def test_intersection_and_area_fit_together():
    a = random_boxes(5)
    torch.testing.assert_close(boxes.intersection(a, a).diagonal(), boxes.area(a))


def test_decode_undoes_encode():
    target, anchors = random_boxes(3, 40), random_boxes(40, seed=1)
    torch.testing.assert_close(boxes.decode(boxes.encode(target, anchors), anchors), target, rtol=1e-5, atol=1e-3)


def test_deltas_by_hand():
    anchor, box = torch.tensor([10.0, 20, 30, 60]), torch.tensor([20.0, 20, 60, 40])
    expected = [20 / 20, -10 / 40, math.log(40 / 20), math.log(20 / 40)]
    torch.testing.assert_close(boxes.encode(box, anchor), torch.tensor(expected))
    assert torch.equal(boxes.decode(torch.zeros(4), anchor), anchor)


def test_decode_bounds_the_size_and_computes_in_fp32():
    anchor = torch.tensor([0.0, 0, 16, 16])
    huge = boxes.decode(torch.tensor([0.0, 0, 50, 50], dtype=torch.bfloat16), anchor)
    assert huge.dtype == torch.float32
    torch.testing.assert_close(boxes.area(huge), torch.tensor(1000.0**2), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_clip_cuts_each_image_to_its_own_height_and_width(dtype):
    some, sizes = random_boxes(3, 20), torch.tensor([[30, 70], [100, 5], [1, 200]], dtype=dtype)
    clipped = boxes.clip(some, sizes)
    for n, size in enumerate(sizes.tolist()):
        assert torch.equal(clipped[n], clip_boxes_to_image(some[n], tuple(size)))
    assert not torch.equal(clipped, some)

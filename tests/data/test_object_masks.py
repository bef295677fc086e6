"""Masks: what is cropped and pasted is what a bitmap of the whole input would give."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import roi_align

from fpn_ablate.structures.masks import ObjectMasks, paste
from fpn_ablate.utils import rle

SIZE = 40, 60
BOXES = torch.tensor([[10.0, 5, 30, 20], [20, 3, 50, 33], [-8, -4, 70, 44], [3.3, 2.2, 31.7, 29.9]])
OBJECTS = torch.tensor([0, 1, 0, 1])


@pytest.fixture
def bitmaps() -> np.ndarray:
    """A rectangle, and a rectangle with a hole and a second part."""
    masks = np.zeros((2, *SIZE), bool)
    masks[0, 5:20, 10:30] = masks[1, 3:33, 20:50] = masks[1, 36:40, :5] = True
    masks[1, 10:20, 30:40] = False
    return masks


@pytest.mark.parametrize("aligned", [True, False])
def test_a_crop_is_that_of_the_bitmap(bitmaps, aligned):
    masks = ObjectMasks(rle.encode(bitmaps), SIZE, SIZE)
    whole = torch.from_numpy(bitmaps)[OBJECTS, None].float()
    expected = roi_align(whole, [box[None] for box in BOXES], 14, aligned=aligned)[:, 0]
    assert torch.equal(masks.crop(OBJECTS, BOXES, 14, aligned), expected)


@pytest.mark.parametrize("aligned", [True, False])
def test_a_crop_of_a_mirrored_image_is_that_of_the_mirrored_bitmap(bitmaps, aligned):
    masks = ObjectMasks(rle.encode(bitmaps), SIZE, SIZE, flipped=True)
    whole = torch.from_numpy(bitmaps[..., ::-1].copy())[OBJECTS, None].float()
    expected = roi_align(whole, [box[None] for box in BOXES], 14, aligned=aligned)[:, 0]
    inside = slice(None) if aligned else [0, 1, 3]  # a corner outside of the image counts on another side of it
    torch.testing.assert_close(masks.crop(OBJECTS, BOXES, 14, aligned)[inside], expected[inside], atol=1e-5, rtol=0)


def test_a_crop_follows_resize_and_flip(bitmaps):
    plain = ObjectMasks(rle.encode(bitmaps), SIZE, SIZE)
    changed = ObjectMasks(plain.counts, SIZE, (80, 180), flipped=True)
    x1, y1, x2, y2 = (BOXES * torch.tensor([3.0, 2, 3, 2])).unbind(-1)
    mirrored = torch.stack([180 - x2, y1, 180 - x1, y2], -1)
    torch.testing.assert_close(changed.crop(OBJECTS, mirrored, 7).flip(-1), plain.crop(OBJECTS, BOXES, 7))


def test_a_pasted_mask_is_where_its_box_is(bitmaps):
    boxes = torch.tensor([[10.0, 5, 30, 20], [20, 3, 50, 33]])
    bitmaps[1, 36:40, :5] = False  # outside of its box
    masks = ObjectMasks(rle.encode(bitmaps), SIZE, SIZE)
    pasted = paste(masks.crop(torch.arange(2), boxes, 28), boxes, SIZE)
    assert (rle.decode(pasted, SIZE) != bitmaps).mean() < 0.01


def test_a_mask_is_pasted_as_if_it_were_resized_to_the_whole_image():
    boxes = torch.tensor([[10.5, 5.2, 30.1, 20.9], [-8, -4, 70, 44], [55, 35, 90, 80], [3.3, 2, 3.6, 39], [70, 50, 80, 60]])
    masks = F.interpolate(torch.rand(len(boxes), 1, 4, 4, generator=torch.Generator().manual_seed(0)), (14, 14))[:, 0]
    masks[2] = 0.9  # only a corner is inside
    x, y = torch.arange(SIZE[1]) + 0.5, torch.arange(SIZE[0]) + 0.5
    x1, y1, x2, y2 = boxes[..., None].unbind(1)
    u, v = (x - x1) / (x2 - x1) * 2 - 1, (y - y1) / (y2 - y1) * 2 - 1
    grid = torch.stack(torch.broadcast_tensors(u[:, None], v[..., None]), -1)
    whole = F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0] > 0.5
    assert whole.flatten(1).any(1).tolist() == [True] * 4 + [False]
    # The windows' last bins reach half a bin beyond the box, where less than half of a mask is left.
    assert np.array_equal(rle.decode(paste(masks, boxes, SIZE), SIZE), whole.numpy())
    assert paste(masks[:0], boxes[:0], SIZE) == []


def test_a_box_beside_the_image_has_no_pixel():
    boxes = torch.tensor([[-80.0, 10, -20, 30], [10, -90, 30, -20], [70, 10, 90, 30], [10.0, 5, 10, 20]])
    pasted = paste(torch.ones(4, 7, 7), boxes, SIZE)
    assert not rle.areas(pasted, SIZE).any()


def test_polygons_of_one_object_are_one_mask(bitmaps):
    polygons = [[10, 5, 30, 5, 30, 20, 10, 20], [0, 30, 4, 30, 4, 40, 0, 40]]
    mask = rle.decode([rle.from_polygons(polygons, SIZE)], SIZE)[0]
    assert mask[5:20, 10:30].all() and mask[30:40, :4].all() and mask.sum() == 15 * 20 + 10 * 4
    assert rle.areas(rle.encode(bitmaps), SIZE).tolist() == bitmaps.sum((1, 2)).tolist()

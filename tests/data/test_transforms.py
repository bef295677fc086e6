"""From samples to a batch: resize, flip, pad."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.ops import roi_align
from torchvision.transforms.v2 import functional as v2
from torchvision.tv_tensors import BoundingBoxFormat

from fpn_ablate.data.transforms import Resize, collate, hflip, prepare, to_native
from fpn_ablate.structures.batch import Sample
from fpn_ablate.utils import rle


def sample(height=40, width=60, boxes=((10, 5, 30, 25),), crowd=None, image_id=1) -> Sample:
    """Black, with each box painted white."""
    image = np.zeros((height, width, 3), dtype=np.uint8)
    for x1, y1, x2, y2 in boxes:
        image[y1:y2, x1:x2] = 255
    return Sample(
        image,
        np.array(boxes, dtype=np.float32).reshape(-1, 4),
        np.arange(1, len(boxes) + 1, dtype=np.int64),
        np.zeros(len(boxes), dtype=bool) if crowd is None else np.array(crowd),
        image_id,
    )


def with_proposals(one: Sample, proposals) -> Sample:
    return replace(one, proposals=np.array(proposals, dtype=np.float32).reshape(-1, 4))


def extent(image: torch.Tensor) -> torch.Tensor:
    """XYXY of the part of (3, H, W) that is brighter than half, to a whole pixel."""
    white = image[0].float() / 255
    rows, columns = white.amax(1), white.amax(0)
    y = torch.nonzero(rows > 0.5).flatten()
    x = torch.nonzero(columns > 0.5).flatten()
    return torch.tensor([x[0], y[0], x[-1] + 1, y[-1] + 1], dtype=torch.float32)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("short, long", [(40, 60), (80, 200), (83, 1000), (21, 1000), (200, 90), (37, 41)])
@pytest.mark.parametrize("size", [(40, 60), (61, 43), (55, 55)])
def test_boxes_follow_pixels_through_resize_flip_and_pad(size, short, long, flip):
    item = prepare(sample(*size), Resize(short, long), flip)
    other = prepare(sample(90, 130), Resize(short, long), not flip)
    batch = collate([item, other])
    for n in range(2):
        torch.testing.assert_close(extent(batch.images[n]), batch.boxes[n, 0], atol=0.75, rtol=0)
    assert batch.images.shape[-2] % 32 == 0 and batch.images.shape[-1] % 32 == 0


@pytest.mark.parametrize("flip", [False, True])
def test_masks_follow_pixels_through_resize_and_flip(flip):
    """The object is the white of the picture, so a crop of its mask shows what the same crop of the picture shows."""
    first, none = sample(40, 60, ((10, 5, 30, 25),)), sample(50, 50, ())
    first = replace(first, masks=rle.encode(first.image[None, ..., 0] > 0))
    batch = collate([prepare(one, Resize(80, 1000), flip) for one in (first, replace(none, masks=[]))])
    box = batch.boxes[0] + torch.tensor([-10.0, -4, 6, 14])
    pixels = roi_align(batch.images[:1, :1].float() / 255, [box], 7, aligned=True)[:, 0]
    torch.testing.assert_close(batch.masks[0].crop(torch.tensor([0]), box, 7), pixels, atol=0.1, rtol=0)
    assert [len(masks.counts) for masks in batch.masks] == [1, 0]
    assert collate([prepare(none, Resize(80, 1000), flip)]).masks is None


@pytest.mark.parametrize("short, long", [(80, 200), (83, 1000), (21, 1000), (200, 90)])
@pytest.mark.parametrize("size", [(40, 60), (61, 43), (55, 55), (500, 31)])
def test_resize_and_flip_agree_with_torchvision_on_boxes(size, short, long):
    image = torch.zeros(3, *size, dtype=torch.uint8)
    boxes = torch.tensor([[3.0, 4.5, 20.0, 31.0], [0.0, 0.0, size[1], size[0]]])
    resized, scaled = Resize(short, long)(image, boxes)
    expected, canvas = v2.resize_bounding_boxes(boxes, size, list(resized.shape[1:]))
    torch.testing.assert_close(scaled, expected)
    mirrored = v2.horizontal_flip_bounding_boxes(scaled, BoundingBoxFormat.XYXY, canvas)
    torch.testing.assert_close(hflip(resized, scaled)[1], mirrored)
    torch.testing.assert_close(to_native(scaled, resized.shape[1:], size), boxes)


@pytest.mark.parametrize("height, width", [(480, 640), (640, 480), (375, 500), (200, 1000), (1, 4000), (800, 800)])
def test_size_has_the_short_side_or_the_longest_long_side(height, width):
    size = Resize(800, 1333).size(height, width)
    assert (min(size) == 800 and max(size) <= 1333) or max(size) == 1333
    assert min(size) >= 1
    if min(height, width) > 1:
        assert size[0] / size[1] == pytest.approx(height / width, rel=0.002)


def test_at_its_size_already_the_image_is_untouched():
    one = sample(37, 53)
    item = prepare(one, Resize(37, 1000), False)
    assert np.array_equal(item.image.permute(1, 2, 0).numpy(), one.image)
    assert np.array_equal(item.boxes.numpy(), one.boxes)
    image = torch.from_numpy(one.image).permute(2, 0, 1)
    assert Resize(37, 1000)(image, item.boxes)[0] is image


def test_flip_twice_is_nothing():
    image, boxes = torch.arange(3 * 5 * 7, dtype=torch.uint8).reshape(3, 5, 7), torch.tensor([[1.0, 2, 4, 3]])
    once = hflip(image, boxes)
    assert not torch.equal(once[0], image) and once[1].tolist() == [[3.0, 2.0, 6.0, 3.0]]
    twice = hflip(*once)
    assert torch.equal(twice[0], image) and torch.equal(twice[1], boxes)


def test_samples_are_not_changed():
    one, copy = (with_proposals(sample(), [[1, 2, 30, 40]]) for _ in range(2))
    batch = collate([prepare(one, Resize(40, 100), True), prepare(one, Resize(40, 100), False)])
    for tensor in (batch.images, batch.boxes, batch.proposals):
        tensor.fill_(7)
    assert all(np.array_equal(getattr(one, name), getattr(copy, name)) for name in ("image", "boxes", "proposals"))


def test_batch_equals_singles():
    samples = [
        sample(40, 60, [(1, 2, 3, 4), (5, 6, 30, 20), (0, 0, 60, 40)], [False, True, False], 5),
        sample(33, 20, [], None, 6),
        sample(64, 64, [(8, 8, 16, 16)], [False], 7),
    ]
    items = [prepare(s, Resize(48, 80), s.image_id == 7) for s in samples]
    batch = collate(items)
    assert batch.image_ids == [5, 6, 7]
    assert batch.images.shape == (3, 3, 96, 96) and batch.images.dtype == torch.uint8
    assert batch.boxes.shape == (3, 3, 4) and batch.labels.dtype == torch.int64
    for n, (item, one) in enumerate(zip(items, samples, strict=True)):
        h, w = item.image.shape[1:]
        g = len(one.boxes)
        assert batch.sizes[n].tolist() == [h, w]
        assert torch.equal(batch.images[n, :, :h, :w], item.image)
        assert batch.images[n].sum() == item.image.sum()  # nothing but 0 in the padding
        assert torch.equal(batch.boxes[n, :g], item.boxes) and not batch.boxes[n, g:].any()
        assert batch.labels[n].tolist() == [*one.labels.tolist(), *[0] * (3 - g)]
        assert batch.crowd[n].tolist() == [*one.crowd.tolist(), *[False] * (3 - g)]
        assert batch.valid[n].tolist() == [*(~one.crowd).tolist(), *[False] * (3 - g)]
    assert batch.proposals is None and batch.proposals_valid is None


def test_batch_without_any_object():
    batch = collate([prepare(sample(30, 20, []), Resize(20, 99), flip) for flip in (False, True)])
    assert batch.boxes.shape == (2, 0, 4) and batch.labels.shape == batch.valid.shape == batch.crowd.shape == (2, 0)
    assert batch.images.shape == (2, 3, 32, 32)


def test_one_image_of_a_multiple_of_the_divisor_gets_no_padding():
    assert collate([prepare(sample(64, 96), Resize(64, 96), False)]).images.shape == (1, 3, 64, 96)


def test_proposals_are_padded_each_image_with_as_many_as_it_has():
    ours = [[[1, 2, 3, 4], [5, 6, 30, 20], [0, 0, 60, 40]], [], [[8, 8, 16, 16]]]
    samples = [with_proposals(sample(40, 60, boxes), own) for boxes, own in zip(([], [(1, 1, 9, 9)], []), ours, strict=True)]
    batch = collate([prepare(one, Resize(80, 999), False) for one in samples])
    assert batch.proposals.shape == (3, 3, 4) and batch.proposals.dtype == torch.float32
    assert batch.proposals_valid.tolist() == [[True] * 3, [False] * 3, [True, False, False]]
    for n, own in enumerate(ours):
        assert batch.proposals[n, : len(own)].tolist() == [[2.0 * x for x in box] for box in own]  # best first, as they came
        assert not batch.proposals[n, len(own) :].any()
    assert batch.boxes.shape == (3, 1, 4)  # P and G have nothing to do with each other


def test_a_batch_without_any_proposal_differs_from_one_of_a_set_without_proposals():
    batch = collate([prepare(with_proposals(sample(), []), Resize(40, 99), flip) for flip in (False, True)])
    assert batch.proposals.shape == (2, 0, 4) and batch.proposals_valid.shape == (2, 0)
    assert batch.to("meta").proposals.is_meta and batch.to("meta").proposals_valid.is_meta
    plain = collate([prepare(sample(), Resize(40, 99), flip) for flip in (False, True)])
    assert plain.proposals is None and plain.to("meta").proposals is None and plain.to("meta").boxes.is_meta


def test_items_with_and_without_proposals_do_not_make_a_batch():
    with pytest.raises(TypeError):
        collate([prepare(sample(), Resize(40, 99), False), prepare(with_proposals(sample(), []), Resize(40, 99), False)])

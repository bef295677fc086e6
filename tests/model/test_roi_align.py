"""RoIAlign as a sparse product against torchvision's kernel: values and gradients, on several levels and images at once."""

import pytest
import torch
from torchvision.ops import roi_align as theirs

from fpn_ablate.model.ops.roi_align import roi_align

STRIDES, SIDES = (4, 8, 16), (96, 160)


def maps(images=2, channels=5):
    generator = torch.Generator().manual_seed(1)
    sizes = [tuple(-(-side // stride) for side in SIDES) for stride in STRIDES]
    return [torch.randn(images, channels, *size, generator=generator, dtype=torch.float64) for size in sizes]


def rois(count=60, images=2):
    """Boxes of all sizes, some of them partly or wholly outside, some without an area: (image, level, boxes)."""
    generator = torch.Generator().manual_seed(2)
    corner = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 200 - 30
    side = torch.rand(count, 2, generator=generator, dtype=torch.float64) ** 3 * 150
    side[::7] = 0
    draw = [torch.randint(0, top, (count,), generator=generator) for top in (images, len(STRIDES))]
    return *draw, torch.cat([corner, corner + side], 1)


def one_by_one(features, image, level, boxes, resolution, ratio, aligned):
    rows = [
        theirs(features[k], torch.cat([n.double()[None], box])[None], resolution, 1 / STRIDES[k], ratio, aligned)
        for n, k, box in zip(image, level, boxes, strict=True)
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [1, 2, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients_are_torchvisions(aligned, ratio, layout):
    results = []
    for pool in (one_by_one, lambda f, *more: roi_align(f, STRIDES, *more)):
        features = [x.to(memory_format=layout).requires_grad_() for x in maps()]
        pooled = pool(features, *rois(), 5, ratio, aligned)
        (pooled * torch.arange(pooled.numel(), dtype=torch.float64).view_as(pooled).cos()).sum().backward()
        results.append([pooled, *(x.grad for x in features)])
    assert all(float(x.detach().abs().max()) > 0.1 for x in results[0])
    for ours, expected in zip(*results[::-1], strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)


def test_no_roi_and_levels_without_rois():
    features = [x.requires_grad_() for x in maps()]
    image, level, boxes = (x[:0] for x in rois())
    empty = roi_align(features, STRIDES, image, level, boxes, 7, 2, False)
    assert empty.shape == (0, 5, 7, 7)
    empty.sum().backward()
    image, level, boxes = rois()
    roi_align(features, STRIDES, image, torch.zeros_like(level), boxes, 7, 2, False).sum().backward()
    assert features[0].grad.any() and not features[1].grad.any()

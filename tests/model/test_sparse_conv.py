"""Convolutions at some cells are convolutions over all of them, read at these cells."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fpn_ablate.model.ops.sparse_conv import LazyMap, conv3x3_at, gather_3x3

SIZES = (9, 7), (4, 5), (1, 1)


def maps(images=2, channels=3):
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(images, channels, *size, generator=draw, dtype=torch.float64) for size in SIZES]


def every_cell(images=2):
    return torch.arange(sum(h * w for h, w in SIZES)).repeat(images, 1)


def smoothing(channels=3):
    torch.manual_seed(0)
    return nn.Conv2d(channels, channels, 3, padding=1).double()


def over_all(levels, conv):
    """The convolution of each map: (N, cells of all levels, out)."""
    return torch.cat([conv(x).flatten(2).transpose(1, 2) for x in levels], 1)


def test_every_cell_by_its_surroundings_is_the_convolution():
    levels, conv = maps(), smoothing()
    out = conv3x3_at(gather_3x3(levels, every_cell()), conv).view(2, -1, 3)
    torch.testing.assert_close(out, over_all(levels, conv))


def test_some_cells_in_any_order_and_twice():
    levels, conv = maps(), smoothing()
    cell = torch.tensor([[70, 0, 83, 0], [62, 63, 82, 6]])
    out = conv3x3_at(gather_3x3(levels, cell), conv).view(2, 4, 3)
    torch.testing.assert_close(out, over_all(levels, conv).gather(1, cell[..., None].expand(-1, -1, 3)))


@pytest.mark.parametrize("lazy", [(0,), (1,), (0, 1), (0, 1, 2)])
def test_lazy_maps_are_as_if_convolved_before(lazy):
    """Values and gradients of two convolutions one after the other, the first of them at the cells that the second reads."""
    conv, head, cell = smoothing(), smoothing(), torch.tensor([[70, 0, 83, 0], [62, 63, 82, 6]])
    results = []
    for is_lazy in (False, True):
        levels = [x.requires_grad_() for x in maps()]
        made = [LazyMap(x, conv) if is_lazy and i in lazy else conv(x) for i, x in enumerate(levels)]
        out = conv3x3_at(gather_3x3(made, cell), head)
        results.append((out, torch.autograd.grad(out.square().sum(), [*levels, *conv.parameters()])))
    torch.testing.assert_close(results[1], results[0])


def test_torchs_functions_and_slices_get_the_whole_convolution_of_a_lazy_map():
    x, conv = maps()[0], smoothing()
    whole = conv(x)
    for use in (F.relu, lambda y: y[..., ::2], lambda y: y.mean(), lambda y: torch.add(whole, y)):
        assert torch.equal(use(LazyMap(x, conv)), use(whole))


def test_rows_outside_a_map_are_zero():
    levels = maps()
    padded = F.pad(levels[0], (1, 1, 1, 1))
    corner = gather_3x3(levels, torch.tensor([[0], [0]])).view(2, 3, 3, 3)
    torch.testing.assert_close(corner, padded[:, :, :3, :3].permute(0, 2, 3, 1))

"""Convolutions at some cells are convolutions over all of them, read at these cells."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fpn_ablate.model import build, init
from fpn_ablate.model.ops.sparse_conv import LazyConv2d, LazyMap, conv3x3_at, gather_3x3
from fpn_ablate.structures.instances import Targets
from fpn_ablate.utils.seeding import torch_generator

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


def test_an_rpn_alone_smooths_what_it_looks_at(config, monkeypatch):
    """Same losses and gradients as with whole maps, and P2 is not convolved over."""
    cfg = config("task=rpn", "rpn.samples=8", "recipe.short_side=128", "backbone.freeze_at=0")
    model = build.build_detector(cfg)
    init.initialise(model, 0)
    model = model.to(memory_format=torch.channels_last).train()
    boxes = torch.tensor([[[10.0, 20, 60, 90], [70, 5, 120, 30]]] * 2)
    yes = torch.ones(2, 2, dtype=torch.bool)
    truth = Targets(boxes, yes.long(), yes, ~yes, torch.tensor([[128, 128]] * 2))
    images = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 255
    asked, at = [], LazyConv.at
    monkeypatch.setattr(LazyConv, "at", lambda self, cell: asked.append(len(cell)) or at(self, cell))
    convolved = []
    model.neck.smooth["p2"].register_forward_hook(lambda *_: convolved.append("p2"))
    results = []
    for read in (None, model.rpn.max_sampled_cells):
        monkeypatch.setattr(type(model.rpn), "max_sampled_cells", read or 10**6)
        losses = model.losses(images, truth, torch_generator(0, "sampling"))
        results.append((losses, torch.autograd.grad(sum(losses.values()), [p for p in model.parameters() if p.requires_grad])))
        assert (convolved, bool(asked)) == (["p2"], read is not None)
    assert max(asked) <= 2 * 9 * 8
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_rows_outside_a_map_are_zero():
    levels = maps()
    padded = F.pad(levels[0], (1, 1, 1, 1))
    corner = gather_3x3(levels, torch.tensor([[0], [0]])).view(2, 3, 3, 3)
    torch.testing.assert_close(corner, padded[:, :, :3, :3].permute(0, 2, 3, 1))

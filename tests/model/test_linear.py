"""The products of oneDNN are those of torch.nn.functional.linear, forward and backward."""

import pytest
import torch
import torch.nn.functional as F

from fpn_ablate.model import linear as module
from fpn_ablate.model.linear import Linear, linear


def operands(rows=37, inner=53, out=19, dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    shapes = (rows, inner), (out, inner), (out,)
    return [torch.randn(shape, generator=draw, dtype=dtype).requires_grad_() for shape in shapes]


def both(x, weight, bias, wanted=(True, True, True)):
    """Values and gradients of `linear`, then of F.linear."""
    grad = torch.randn(len(x), len(weight), generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    for function in (linear, F.linear):
        y = function(x, weight, bias)
        yield y, torch.autograd.grad(y, [v for v, on in zip((x, weight, bias), wanted, strict=True) if on], grad)


@pytest.mark.parametrize("rows", [0, 1, 37])
def test_values_and_gradients(rows):
    (y, gradients), (expected, wanted) = both(*operands(rows))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients, wanted)


def test_views_are_read_as_they_lie():
    x, weight, bias = operands()
    x, weight = x.detach().t().contiguous().t().requires_grad_(), weight.detach().t().contiguous().t().requires_grad_()
    assert not x.is_contiguous() and not weight.is_contiguous()
    (y, gradients), (expected, wanted) = both(x, weight, bias)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients, wanted)


def test_what_is_frozen_gets_no_gradient():
    x, weight, bias = operands()
    x.requires_grad_(False), bias.requires_grad_(False)
    (_, (found,)), (_, (wanted,)) = both(x, weight, bias, (False, True, False))
    torch.testing.assert_close(found, wanted)


def test_gradients_by_finite_differences_of_the_function_itself(monkeypatch):
    """In double precision, which oneDNN lacks, with MKL's product in its place: the formulas, not the rounding."""
    monkeypatch.setattr(module, "_times", lambda x, weight, bias=None: F.linear(x, weight, bias))
    assert torch.autograd.gradcheck(module._Product.apply, operands(5, 4, 3, torch.float64))


@pytest.mark.skipif(not module._ONEDNN, reason="this torch has no oneDNN")
def test_fp32_goes_to_onednn_and_nothing_else_does(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "_times", lambda x, weight, bias=None: calls.append(x.dtype) or F.linear(x, weight, bias))
    layer, x = Linear(8, 4), torch.randn(3, 8)
    layer(x)
    assert calls == [torch.float32]
    layer.double()(x.double())
    layer.to("meta")(x.to("meta"))
    assert calls == [torch.float32]

"""The products of oneDNN are those of torch.nn.functional.linear, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fpn_ablate.model.ops import onednn as module
from fpn_ablate.model.ops.onednn import Conv2d, Linear, linear
from fpn_ablate.model.ops.replace import variant


def operands(rows=37, inner=53, out=19, dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    shapes = (rows, inner), (out, inner), (out,)
    return [torch.randn(shape, generator=draw, dtype=dtype).requires_grad_() for shape in shapes]


def both(x, weight, bias, needs_grad=(True, True, True)):
    """Values and gradients of `linear`, then of F.linear."""
    grad = torch.randn(len(x), len(weight), generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    for function in (linear, F.linear):
        y = function(x, weight, bias)
        yield y, torch.autograd.grad(y, [v for v, on in zip((x, weight, bias), needs_grad, strict=True) if on], grad)


@pytest.mark.parametrize("rows", [0, 1, 37])
def test_values_and_gradients(rows):
    (y, gradients), (expected, expected_gradients) = both(*operands(rows))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients, expected_gradients)


def test_views_are_read_as_they_lie():
    x, weight, bias = operands()
    x, weight = x.detach().t().contiguous().t().requires_grad_(), weight.detach().t().contiguous().t().requires_grad_()
    assert not x.is_contiguous() and not weight.is_contiguous()
    (y, gradients), (expected, expected_gradients) = both(x, weight, bias)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients, expected_gradients)


def test_what_is_frozen_gets_no_gradient():
    x, weight, bias = operands()
    x.requires_grad_(False), bias.requires_grad_(False)
    (_, (gradient,)), (_, (expected,)) = both(x, weight, bias, (False, True, False))
    torch.testing.assert_close(gradient, expected)


def test_gradients_by_finite_differences_of_the_function_itself(monkeypatch):
    """In double precision, which oneDNN lacks, with MKL's product in its place: the formulas, not the rounding."""
    monkeypatch.setattr(module, "_multiply", lambda x, weight, bias=None: F.linear(x, weight, bias))
    assert torch.autograd.gradcheck(module._Product.apply, operands(5, 4, 3, torch.float64))


@pytest.mark.skipif(not module._ONEDNN, reason="this torch has no oneDNN")
def test_a_second_derivative_is_an_error_and_not_0():
    x, weight, bias = operands()
    (grad,) = torch.autograd.grad(linear(x, weight, bias).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.skipif(not module._ONEDNN, reason="this torch has no oneDNN")
def test_fp32_goes_to_onednn_and_nothing_else_does(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "_multiply", lambda x, weight, bias=None: calls.append(x.dtype) or F.linear(x, weight, bias))
    layer, x = Linear(8, 4), torch.randn(3, 8)
    layer(x)
    assert calls == [torch.float32]
    layer.double()(x.double())
    layer.to("meta")(x.to("meta"))
    assert calls == [torch.float32]


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def images(count=2, channels=5):
    x = torch.randn(count, channels, 7, 6, generator=torch.Generator().manual_seed(2))
    return x.to(memory_format=torch.channels_last).requires_grad_()


@pytest.mark.parametrize("bias", [True, False])
def test_a_1x1_convolution_is_a_product(one_thread, bias, monkeypatch):
    """With an activation in place behind it, which must not copy, and gradients of all."""
    torch.manual_seed(0)
    plain = nn.Conv2d(5, 4, 1, bias=bias).to(memory_format=torch.channels_last)
    ours = variant(plain, Conv2d)
    calls, real = [], module._multiply
    monkeypatch.setattr(module, "_multiply", lambda *a: calls.append(1) or real(*a))
    results = []
    for conv in (plain, ours):
        x = images()
        y = F.relu_(conv(x))
        assert y.is_contiguous(memory_format=torch.channels_last)
        results.append((y, torch.autograd.grad(y.square().sum(), [x, *conv.parameters()])))
    assert len(calls) == 3 * module._ONEDNN
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize(
    "layer, x",
    [
        (nn.Conv2d(5, 4, 3), images()),
        (nn.Conv2d(5, 4, 1, stride=2), images()),
        (nn.Conv2d(5, 4, 1, padding=1), images()),
        (nn.Conv2d(6, 6, 1, groups=2), images(channels=6)),
        (nn.Conv2d(5, 4, 1), images().detach().contiguous()),
        (nn.Conv2d(5, 4, 1), images(16)),
    ],
)
def test_other_convolutions_stay_with_torch(one_thread, layer, x, monkeypatch):
    monkeypatch.setattr(module, "_multiply", lambda *a: pytest.fail("a product"))
    expected = layer(x)
    torch.testing.assert_close(variant(layer, Conv2d)(x), expected)


def test_several_threads_stay_with_torch(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(module, "_multiply", lambda *a: pytest.fail("a product"))
    Conv2d(5, 4, 1)(images())


def test_a_view_would_be_copied_by_an_activation_in_place(one_thread):
    """Backward of a relu in place behind the product makes no copy of the map."""
    conv, x = Conv2d(5, 4, 1), images()
    assert not F.relu_(conv(x))._is_view()

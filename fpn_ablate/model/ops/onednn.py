"""torch's layers, their products by the faster library.

PyTorch gives a CPU's fp32 products to MKL, which on processors that are not Intel's runs at half the speed of oneDNN, whose
convolutions stand beside them in the same network (95 against 220 GFLOP/s on one core of an EPYC with AVX-512).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear for x (M, in), weight (out, in) and bias (out,): (M, out), equal but for rounding."""
    return _Product.apply(x, weight, bias) if _fits(x, weight) and len(x) else F.linear(x, weight, bias)


def _fits(x: Tensor, weight: Tensor) -> bool:
    return _ONEDNN and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32


class Linear(nn.Linear):
    """`nn.Linear` on (M, in), by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Conv2d(nn.Conv2d):
    """`nn.Conv2d`. A 1x1 convolution of a few images on one thread, which torch gives to MKL, is a product here."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        last = x.is_contiguous(memory_format=torch.channels_last)
        if last and self._is_product() and _fits(x, weight) and len(x) < 16 and torch.get_num_threads() == 1:
            return _Pointwise.apply(x, weight, bias)
        return super()._conv_forward(x, weight, bias)

    def _is_product(self) -> bool:
        return self.kernel_size == self.stride == (1, 1) and self.padding == (0, 0) and self.groups == 1


class _Product(torch.autograd.Function):
    """x (M, K), weight (N, K), bias (N,) -> (M, N)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _times(x, weight, bias)

    @staticmethod
    @once_differentiable  # else a second derivative would be 0, with a warning
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grad, *ctx.saved_tensors)


class _Pointwise(torch.autograd.Function):
    """x (N, C, H, W) in channels_last, weight (O, C, 1, 1), bias (O,) -> (N, O, H, W), likewise."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _map(_times(_cells(x), weight.flatten(1), bias), x)

    @staticmethod
    @once_differentiable  # else a second derivative would be 0, with a warning
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        by_x, by_weight, by_bias = _gradients(ctx, _cells(grad), _cells(x), weight.flatten(1))
        return None if by_x is None else _map(by_x, x), None if by_weight is None else by_weight.view_as(weight), by_bias


def _cells(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N * H * W, C)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _map(cells: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_cells`, for as many images and of the size of `like`.

    A tensor of its own in the same memory: an activation in place would copy the whole of a view.
    """
    n, _, h, w = like.shape
    view = cells.view(n, h, w, -1).permute(0, 3, 1, 2)
    return cells.new_empty(0).set_(cells.untyped_storage(), 0, view.shape, view.stride())


def _gradients(ctx, grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of x (M, K), weight (N, K) and bias (N,), where they are wanted, from that of their product (M, N)."""
    wanted = ctx.needs_input_grad
    return (
        _times(grad, weight.t()) if wanted[0] else None,
        _times(grad.t(), x.t()) if wanted[1] else None,
        grad.sum(0) if wanted[2] else None,
    )


def _times(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (M, K) times weight (N, K) turned: (M, N)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

"""Linear and Conv2d that run fp32 CPU matmuls in oneDNN instead of MKL.

PyTorch runs a CPU's fp32 matmuls in MKL. On processors other than Intel's MKL has half the speed of oneDNN, which runs the
convolutions of the same network (95 against 220 GFLOP/s on one core of an EPYC with AVX-512).

Shape letters: products are x (M, K) times weight (N, K) transposed; maps are (N, C, H, W) with O output channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute F.linear of x (M, in), weight (out, in) and bias (out,): (M, out), equal but for rounding."""
    return _Product.apply(x, weight, bias) if _supported(x, weight) and len(x) else F.linear(x, weight, bias)


def _supported(x: Tensor, weight: Tensor) -> bool:
    return _ONEDNN and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32


class Linear(nn.Linear):
    """`nn.Linear` on (M, in) that calls `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Conv2d(nn.Conv2d):
    """`nn.Conv2d`, whose 1x1 convolutions of a few images on one thread, which torch runs in MKL, are products in oneDNN."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        if channels_last and self._is_product() and _supported(x, weight) and len(x) < 16 and torch.get_num_threads() == 1:
            return _Pointwise.apply(x, weight, bias)
        return super()._conv_forward(x, weight, bias)

    def _is_product(self) -> bool:
        return self.kernel_size == self.stride == (1, 1) and self.padding == (0, 0) and self.groups == 1


class _Product(torch.autograd.Function):
    """Product of x (M, K), weight (N, K) and bias (N,): (M, N)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight, bias)

    @staticmethod
    @once_differentiable  # else a second derivative would be 0, with a warning
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grad, *ctx.saved_tensors)


class _Pointwise(torch.autograd.Function):
    """1x1 convolution of x (N, C, H, W), weight (O, C, 1, 1) and bias (O,): (N, O, H, W); both maps in channels_last."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _map(_multiply(to_cells(x), weight.flatten(1), bias), x)

    @staticmethod
    @once_differentiable  # else a second derivative would be 0, with a warning
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        by_x, by_weight, by_bias = _gradients(ctx, to_cells(grad), to_cells(x), weight.flatten(1))
        return None if by_x is None else _map(by_x, x), None if by_weight is None else by_weight.view_as(weight), by_bias


def to_cells(x: Tensor) -> Tensor:
    """Reshape a map (N, C, H, W) to its cells (N * H * W, C)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _map(cells: Tensor, like: Tensor) -> Tensor:
    """Undo `to_cells`: reshape cells to a map of the number of images and the size of `like`.

    The result is a new tensor in the same memory, not a view: an in-place activation would copy the base of a view.
    """
    n, _, h, w = like.shape
    view = cells.view(n, h, w, -1).permute(0, 3, 1, 2)
    return cells.new_empty(0).set_(cells.untyped_storage(), 0, view.shape, view.stride())


def _gradients(ctx, grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x (M, K), weight (N, K) and bias (N,), where needed, from that of their product (M, N)."""
    needs_grad = ctx.needs_input_grad
    return (
        _multiply(grad, weight.t()) if needs_grad[0] else None,
        _multiply(grad.t(), x.t()) if needs_grad[1] else None,
        grad.sum(0) if needs_grad[2] else None,
    )


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply x (M, K) by weight (N, K) transposed: (M, N)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

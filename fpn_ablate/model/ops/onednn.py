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
            return _Product.apply(x, weight, bias)
        return super()._conv_forward(x, weight, bias)

    def _is_product(self) -> bool:
        return self.kernel_size == self.stride == (1, 1) and self.padding == (0, 0) and self.groups == 1


class _Product(torch.autograd.Function):
    """Product of x, which is (M, K) or a map in channels_last, its cells the rows, with weight (N, K, ...) and bias (N,)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _shaped(_multiply(_rows(x), weight.flatten(1), bias), x)

    @staticmethod
    @once_differentiable  # else a second derivative would be 0, with a warning
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad, needs_grad = _rows(grad), ctx.needs_input_grad
        return (
            _shaped(_multiply(grad, weight.flatten(1).t()), x) if needs_grad[0] else None,
            _multiply(grad.t(), _rows(x).t()).view_as(weight) if needs_grad[1] else None,
            grad.sum(0) if needs_grad[2] else None,
        )


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else to_cells(x)


def to_cells(x: Tensor) -> Tensor:
    """Reshape a map (N, C, H, W) to its cells (N * H * W, C)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _shaped(rows: Tensor, like: Tensor) -> Tensor:
    """Undo `_rows`, where `like` was its argument.

    A map is a new tensor in the same memory, not a view: an in-place activation would copy the base of a view.
    """
    if like.dim() == 2:
        return rows
    n, _, h, w = like.shape
    view = rows.view(n, h, w, -1).permute(0, 3, 1, 2)
    return rows.new_empty(0).set_(rows.untyped_storage(), 0, view.shape, view.stride())


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply x (M, K) by weight (N, K) transposed: (M, N)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

"""Products with a weight matrix, by the faster library.

PyTorch gives a CPU's fp32 products to MKL, which on processors that are not Intel's runs at half the speed of oneDNN's, whose
convolutions stand beside them in the same network (220 against 95 GFLOP/s on one core of an EPYC with AVX-512).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.linear for x (M, in), weight (out, in) and bias (out,): (M, out), equal but for rounding."""
    if _ONEDNN and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and len(x):
        return _Product.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """`nn.Linear` on (M, in), by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _times(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (
            _times(grad, weight.t()) if wanted[0] else None,
            _times(grad.t(), x.t()) if wanted[1] else None,
            grad.sum(0) if wanted[2] else None,
        )


def _times(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (M, K) times weight (N, K) turned: (M, N)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

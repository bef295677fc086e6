"""Precision of fp32 and bf16. bf16 is left where its 8 bits are too few: scores would tie, and coordinates lose pixels."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def autocast_off() -> Iterator[None]:
    """Switch autocast off, on GPU and CPU alike."""
    with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
        yield


def uses_bf16(wanted: bool, device: torch.device) -> bool:
    """Return whether convolutions run in bf16: if `recipe.bf16` wants it, on a GPU or a CPU with AMX.

    With AMX a convolution takes a seventh of its time in fp32; on an EPYC, without, it took four times that.
    """
    if device.type == "cuda":
        return wanted
    capabilities = getattr(torch.cpu, "get_capabilities", dict)  # older versions of torch lack it
    return wanted and bool(capabilities().get("amx_bf16", False))


def set_tf32() -> None:
    """Let a GPU compute fp32 convolutions in TF32 (10 bits of mantissa, sums in fp32) and matrix products in fp32.

    These are torch's defaults, whatever the environment says: convolutions are nearly all of the work, and products compute
    scores, deltas and bilinear weights.
    """
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_tf32 = False


def full_precision(x: Tensor) -> Tensor:
    """Return x in fp32, or in fp64 if it is."""
    return x if x.dtype == torch.float64 else x.float()

"""Plugin of pytest for the null device of device.c: change what torch cannot do there, or not with the zeros read from it."""

from typing import Any

import torch
from torch import Tensor

torch.backends.cudnn.enabled = False  # it chooses its kernels by what it reads from the device
_split = Tensor.split


def split(x: Tensor, sizes: Any, dim: int = 0) -> tuple[Tensor, ...]:
    """Split; where the sizes are counts read from the device, and so all 0, the first part gets everything."""
    if x.is_cuda and isinstance(sizes, list) and not any(sizes):
        sizes = [x.shape[dim], *sizes[1:]]
    return _split(x, sizes, dim)


Tensor.split = split

"""Leave bf16 where its 8 bits are too few: scores would tie, and coordinates lose pixels."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def autocast_off() -> Iterator[None]:
    """Switch autocast off, on GPU and CPU alike."""
    with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
        yield


def full_precision(x: Tensor) -> Tensor:
    """Return x in fp32, or in fp64 if it is."""
    return x if x.dtype == torch.float64 else x.float()

"""Cache small tensors that are the same in every step."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


@lru_cache(maxsize=256)
def constant(values: tuple[Any, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return `torch.tensor(values)` on a device, copied there once: each copy of numbers to a GPU waits for it."""
    with torch.inference_mode(False):  # an inference tensor could not be used in training later
        return torch.tensor(values, device=device, dtype=dtype)

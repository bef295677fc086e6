"""Randomness is passed, never global: every consumer draws from a generator of its own, keyed by what it is for.

So two rows at the same seed share the initial weights that they share by name, the images, their order and their flips,
whatever else a row draws. That is what pairs the rows.
"""

import hashlib
import os

import numpy as np
import torch


def key(*parts: object) -> int:
    """A 63-bit seed from any printable parts, e.g. `key(seed, "order", epoch)`. Stable over processes and machines."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def torch_generator(*parts: object, device: torch.device | str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(key(*parts))


def numpy_generator(*parts: object) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(key(*parts)))


def set_deterministic(enabled: bool) -> None:
    """Bit-identical results on the same machine; an operation that has no deterministic form raises."""
    if enabled:
        # cuBLAS reads this when its first handle is made; it has no effect on the CPU.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(enabled)
    # Else torch writes NaN into all memory that it allocates, which is a check of its own code, and 5 % of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = not enabled

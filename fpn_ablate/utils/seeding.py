"""Make random generators. Randomness is passed, never global: each consumer has its own generator, keyed by its purpose.

Rows at the same seed therefore share the initial weights of equally named parameters, the images, their order and their flips,
whatever else a row draws. That pairs the rows.
"""

import hashlib
import os

import numpy as np
import torch


def key(*parts: object) -> int:
    """Derive a 63-bit seed from printable parts, e.g. `key(seed, "order", epoch)`. Stable across processes and machines."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def torch_generator(*parts: object, device: torch.device | str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(key(*parts))


def numpy_generator(*parts: object) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(key(*parts)))


def set_deterministic(enabled: bool, fixed_shapes: bool = False) -> None:
    """Make results bit-identical on the same machine; an operation without a deterministic form raises.

    Args:
        fixed_shapes: whether nearly all batches have one shape. If so, cuDNN times its algorithms for it, unless `enabled`.
    """
    if enabled:
        # cuBLAS reads this when it creates its first handle; it has no effect on the CPU.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(enabled)
    # Otherwise torch fills all memory that it allocates with NaN, a check of its own code that takes 5 % of a step.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = fixed_shapes and not enabled

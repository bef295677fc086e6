"""Set the number of torch's CPU threads for a while: on a CPU it decides the last bits of a result."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch


@lru_cache
def default_threads() -> int:
    """Return torch's own choice: the number at the first call, before any run of this process has set another."""
    return torch.get_num_threads()


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Use `count` threads within the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

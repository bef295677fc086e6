"""Make a module's faster variant from the module itself."""

from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def variant(module: nn.Module, kind: type[M]) -> M:
    """Return a `kind` in the state of `module`: it has the same parameters, buffers, children and attributes, not copies."""
    result = kind.__new__(kind)
    vars(result).update(vars(module))
    return result

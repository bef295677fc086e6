"""Flatten nested settings, and select those under a factor."""

from collections.abc import Iterable
from typing import Any


def flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries into one, with dots in its keys."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            flat |= flatten(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = None if item != item else item  # NaN: undefined, as null is
    return flat


def under(key: str, factors: Iterable[str], prefix: str = "") -> bool:
    """Return True if a dotted key is one of `factors`, or below one; `prefix` stands before each of them."""
    return any(key == prefix + factor or key.startswith(f"{prefix}{factor}.") for factor in factors)

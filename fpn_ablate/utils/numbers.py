"""Tell numbers that can be drawn and averaged from other values of JSON and YAML."""

from typing import Any

LARGEST = 1e30  # sums and squares of such numbers are still floats


def is_finite(value: Any) -> bool:
    """Return True for an integer or float up to LARGEST; one of 400 digits is none."""
    return type(value) in (int, float) and abs(value) <= LARGEST

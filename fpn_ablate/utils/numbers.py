"""Tell numbers that can be drawn and averaged from other values of JSON and YAML."""

import sys
from typing import Any


def is_finite(value: Any) -> bool:
    """Return True for an integer or float within the range of floats; an integer of 400 digits is none."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max

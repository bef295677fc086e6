"""Statistics of one cell."""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation of the `n` defined values; None where they do not exist."""

    mean: float | None
    std: float | None
    n: int


def summarise(values: Iterable[float | None]) -> Summary:
    """Summary of the values that are defined: None and non-finite values are left out, and `n` says so."""
    defined = [float(value) for value in values if value is not None and math.isfinite(value)]
    mean = statistics.fmean(defined) if defined else None
    std = statistics.stdev(defined) if len(defined) > 1 else None
    return Summary(mean, std, len(defined))

"""Boxes of a batch that heads read and return: targets, proposals, detections. XYXY in pixels of the network's input.

Shape letters: N images, G ground-truth boxes, P proposals, D detections (all three padded), K classes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T", bound=Any)


def map_tensors(values: T, function: Callable[[Tensor], Tensor]) -> T:
    """Return a copy of a dataclass with `function` applied to each of its tensors."""
    return replace(values, **{name: function(x) for name, x in vars(values).items() if isinstance(x, Tensor)})


@dataclass(frozen=True)
class BatchDetections:
    """Detections of a batch, best first: boxes (N, D, 4), scores (N, D), labels (N, D) in 1..K, valid (N, D) bool."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    valid: Tensor


@dataclass(frozen=True)
class Targets:
    """Ground truth of a batch: boxes (N, G, 4), labels (N, G) in 1..K, valid (N, G) and crowd (N, G) bool; sizes (N, 2) of the
    images."""

    boxes: Tensor
    labels: Tensor
    valid: Tensor
    crowd: Tensor
    sizes: Tensor


@dataclass(frozen=True)
class Proposals:
    """Proposals of a batch, best first: boxes (N, P, 4), scores (N, P) in 0..1, valid (N, P) bool (the rest is padding)."""

    boxes: Tensor
    scores: Tensor
    valid: Tensor

"""Boxes of a batch that heads read and return: targets, proposals, detections. XYXY in pixels of the network's input.

Shape letters: N images, G ground-truth boxes, P proposals, D detections (all three padded), K classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

from fpn_ablate.structures.masks import ObjectMasks

T = TypeVar("T", bound=Any)


def map_tensors(values: T, function: Callable[[Tensor], Tensor]) -> T:
    """Return a copy of a dataclass with `function` applied to each of its tensors."""
    return replace(values, **{name: function(x) for name, x in vars(values).items() if isinstance(x, Tensor)})


@dataclass(frozen=True)
class BatchDetections:
    """Detections of a batch, best first: boxes (N, D, 4), scores (N, D), labels (N, D) in 1..K, valid (N, D) bool.

    masks: (N, D, R, R) probabilities of R x R bins of each box; None: the detector has no masks.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    valid: Tensor
    masks: Tensor | None = None


@dataclass(frozen=True)
class Targets:
    """Ground truth of a batch: boxes (N, G, 4), labels (N, G) in 1..K, valid (N, G) and crowd (N, G) bool; sizes (N, 2) of the
    images; N `masks`, None without."""

    boxes: Tensor
    labels: Tensor
    valid: Tensor
    crowd: Tensor
    sizes: Tensor
    masks: Sequence[ObjectMasks] | None = None


@dataclass(frozen=True)
class Proposals:
    """Proposals of a batch, best first: boxes (N, P, 4), scores (N, P) in 0..1, valid (N, P) bool (the rest is padding).

    masks: (N, P, R, R) probabilities of R x R bins of each box; None: of boxes alone.
    """

    boxes: Tensor
    scores: Tensor
    valid: Tensor
    masks: Tensor | None = None

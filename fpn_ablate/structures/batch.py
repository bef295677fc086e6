"""Samples of a data set, and batches of them.

Shape letters: N images of H x W pixels, G ground-truth boxes and P proposals (both padded in a batch), K categories. Boxes are
XYXY in absolute pixels; labels are 1..K (0 is background).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fpn_ablate.structures.instances import map_tensors
from fpn_ablate.structures.masks import ObjectMasks


@dataclass(frozen=True)
class Sample:
    """One image with its objects, at native resolution."""

    image: np.ndarray  # (H, W, 3) uint8, RGB
    boxes: np.ndarray  # (G, 4) float32
    labels: np.ndarray  # (G,) int64, 1..K
    crowd: np.ndarray  # (G,) bool: a region of many objects, neither positive nor negative
    image_id: int
    proposals: np.ndarray | None = None  # (P, 4) float32, best first; P differs from image to image and may be 0
    masks: Sequence[bytes] | None = None  # G masks of the objects (`utils.rle`); None: the set has none


@dataclass
class Batch:
    """Images of one step, padded at the right and the bottom to a common size."""

    images: Tensor  # (N, 3, H, W) uint8, or float32 in 0..255
    sizes: Tensor  # (N, 2) int64: height and width without the padding
    boxes: Tensor  # (N, G, 4) float32, in pixels of `images`
    labels: Tensor  # (N, G) int64
    valid: Tensor  # (N, G) bool: a real object, not padding and not crowd
    crowd: Tensor  # (N, G) bool: a crowd region
    image_ids: list[int] = field(default_factory=list)
    proposals: Tensor | None = None  # (N, P, 4) float32, in pixels of `images`, best first; None: the set has none
    proposals_valid: Tensor | None = None  # (N, P) bool: a real proposal, not padding
    masks: list[ObjectMasks] | None = None  # N; None: the set has none

    def to(self, device: torch.device | str) -> "Batch":
        return map_tensors(self, lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Copy to pinned memory, from which a GPU reads while the host goes on. torch's loader calls this."""
        return map_tensors(self, Tensor.pin_memory)


class DetectionDataset(Protocol):
    """Interface of a data set, implemented by `shapes.ShapesDataset`, `coco.CocoDataset`, and `proposals.WithProposals` around
    one of them.
    """

    name: str  # shown in every table
    generated: bool  # True: its results must never be mistaken for COCO's
    categories: Sequence[dict[str, Any]]  # [{"id": ..., "name": ...}], position k is label k + 1
    image_ids: Sequence[int]
    sizes: np.ndarray  # (N, 2) int64: height and width of the samples' images, in the order of image_ids
    area_bounds: tuple[float, float]  # small < a <= medium < b <= large, in square native pixels
    digest: str  # sha256 over everything that decides its samples
    box_digest: str  # the same without masks: of the data of a run that reads none
    has_masks: bool  # samples have masks, and annotations `segmentation`

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def coco(self) -> dict[str, Any]:
        """Return the ground truth as a COCO instances dictionary, in native pixels and native category ids."""
        ...


Splits = tuple[DetectionDataset, DetectionDataset]  # training and validation; validation twice if nothing is trained

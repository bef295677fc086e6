"""From samples to a batch: resize, flip, pad. Pure functions; chance is decided by the caller and passed in.

N images, G objects, P proposals. Boxes are XYXY in pixels of the image they come with; images are (3, H, W).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as v2

from fpn_ablate.config.schema import Recipe
from fpn_ablate.structures.batch import Batch, Sample


@dataclass(frozen=True)
class Item:
    """One image ready to be put into a batch."""

    image: Tensor  # (3, H, W) uint8, or float32 in 0..255 where it was resized without antialiasing
    boxes: Tensor  # (G, 4) float32
    labels: Tensor  # (G,) int64
    crowd: Tensor  # (G,) bool
    image_id: int
    proposals: Tensor | None = None  # (P, 4) float32


@dataclass(frozen=True)
class Resize:
    """Scale the short side to `short_side`, or the long side to `max_side` where it would exceed it (pixels).

    The paper scales the short side to 800 (Sec. 5); a limit of 1333 on the long side is its authors' later default.

    Without `antialias` the image is what torchvision's detectors make of it (GeneralizedRCNNTransform): sides cut down to whole
    pixels, plain bilinear interpolation, and float32, since theirs is never rounded to whole values.
    """

    short_side: int
    max_side: int
    antialias: bool = True

    @staticmethod
    def of(recipe: Recipe) -> "Resize":
        """Return a recipe's."""
        return Resize(recipe.short_side, recipe.max_side, recipe.antialias)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width of the resized image."""
        whole = round if self.antialias else math.floor
        scale = min(self.short_side / min(height, width), self.max_side / max(height, width))
        return max(1, whole(height * scale)), max(1, whole(width * scale))

    def __call__(self, image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Resize an image (3, H, W) uint8 and its boxes (..., 4); an image that has this size already is returned untouched.

        Boxes follow the pixels on each axis, since height and width are rounded apart; `to_native` is the inverse.
        """
        height, width = image.shape[-2:]
        size = self.size(height, width)
        if size == (height, width):
            return image, boxes
        if self.antialias:
            resized = v2.resize(image, list(size), interpolation=InterpolationMode.BILINEAR, antialias=True)
        else:
            resized = F.interpolate(image[None].float(), size=size, mode="bilinear", align_corners=False)[0]
        return resized, boxes * _ratio(size, (height, width), boxes)


def to_native(boxes: Tensor, size: Sequence[int], native_size: Sequence[int]) -> Tensor:
    """Boxes (..., 4) of a resized image of `size` (height, width, no padding) in pixels of the native image."""
    return boxes * _ratio(native_size, size, boxes)


def _ratio(size: Sequence[int], old: Sequence[int], like: Tensor) -> Tensor:
    y, x = float(size[0]) / float(old[0]), float(size[1]) / float(old[1])
    return like.new_tensor([x, y, x, y])


def hflip(image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Mirror left and right."""
    width = image.shape[-1]
    x1, y1, x2, y2 = boxes.unbind(-1)
    return image.flip(-1), torch.stack([width - x2, y1, width - x1, y2], dim=-1)


def prepare(sample: Sample, resize: Resize, flip: bool) -> Item:
    """A sample resized and, where `flip` says so, mirrored. Proposals go the way of the ground-truth boxes, in one tensor."""
    image = torch.from_numpy(sample.image).permute(2, 0, 1)
    boxes, objects = torch.from_numpy(sample.boxes), len(sample.boxes)
    if sample.proposals is not None:
        boxes = torch.cat([boxes, torch.from_numpy(sample.proposals)])
    image, boxes = resize(image, boxes)
    if flip:
        image, boxes = hflip(image, boxes)
    proposals = None if sample.proposals is None else boxes[objects:]
    labels, crowd = torch.from_numpy(sample.labels), torch.from_numpy(sample.crowd)
    return Item(image, boxes[:objects], labels, crowd, sample.image_id, proposals)


def collate(items: Sequence[Item], divisor: int = 32) -> Batch:
    """Pad images with 0 at the right and the bottom to a common multiple of `divisor`, objects to the largest G and
    proposals to the largest P (which may be 0). Either all items have proposals or none has.
    """
    height, width = (math.ceil(max(item.image.shape[axis] for item in items) / divisor) * divisor for axis in (1, 2))
    count, most = len(items), max(len(item.boxes) for item in items)
    batch = Batch(
        images=torch.zeros(count, 3, height, width, dtype=reduce(torch.promote_types, (item.image.dtype for item in items))),
        sizes=torch.tensor([item.image.shape[1:] for item in items], dtype=torch.int64),
        boxes=torch.zeros(count, most, 4),
        labels=torch.zeros(count, most, dtype=torch.int64),
        valid=torch.zeros(count, most, dtype=torch.bool),
        crowd=torch.zeros(count, most, dtype=torch.bool),
        image_ids=[item.image_id for item in items],
    )
    for n, item in enumerate(items):
        h, w = item.image.shape[1:]
        g = len(item.boxes)
        batch.images[n, :, :h, :w] = item.image
        batch.boxes[n, :g], batch.labels[n, :g] = item.boxes, item.labels
        batch.crowd[n, :g], batch.valid[n, :g] = item.crowd, ~item.crowd
    batch.proposals, batch.proposals_valid = _padded([item.proposals for item in items])
    return batch


def _padded(proposals: Sequence[Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
    """N times (P_n, 4) -> (N, P, 4) and (N, P) bool with P the largest P_n; None where there are none."""
    if all(own is None for own in proposals):
        return None, None
    most = max(len(own) for own in proposals)
    boxes, valid = torch.zeros(len(proposals), most, 4), torch.zeros(len(proposals), most, dtype=torch.bool)
    for n, own in enumerate(proposals):
        boxes[n, : len(own)], valid[n, : len(own)] = own, True
    return boxes, valid

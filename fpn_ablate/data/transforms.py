"""Turn samples into a batch: resize, flip, pad. All functions are pure; the caller decides what is flipped.

N images, G objects, P proposals. Boxes are XYXY in pixels of the image they come with; images are (3, H, W).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fpn_ablate.config.schema import Recipe
from fpn_ablate.structures.batch import Batch, Sample
from fpn_ablate.structures.images import resize
from fpn_ablate.structures.masks import ObjectMasks

DIVISOR = 32  # sides of a batch's images are padded to a multiple of it


@dataclass(frozen=True)
class Item:
    """One image, ready for a batch."""

    image: Tensor  # (3, H, W) uint8, or float32 in 0..255 where it was resized without antialiasing
    boxes: Tensor  # (G, 4) float32
    labels: Tensor  # (G,) int64
    crowd: Tensor  # (G,) bool
    image_id: int
    proposals: Tensor | None = None  # (P, 4) float32
    masks: ObjectMasks | None = None  # of G objects


@dataclass(frozen=True)
class Resize:
    """Scale images so that the short side becomes `short_side` pixels, or less where the long side would exceed `max_side`.

    The paper scales the short side to 800 (Sec. 5); a limit of 1333 on the long side is its authors' later default.

    With antialias=False it resizes as torchvision's detectors do (GeneralizedRCNNTransform): sides are rounded down to whole
    pixels, interpolation is plain bilinear, and the result is float32, since torchvision does not round its values.
    """

    short_side: int
    max_side: int
    antialias: bool = True

    @staticmethod
    def of(recipe: Recipe) -> "Resize":
        """Return the resize that a recipe configures."""
        return Resize(recipe.short_side, recipe.max_side, recipe.antialias)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return (height, width) of the resized image."""
        to_int = round if self.antialias else math.floor
        scale = min(self.short_side / min(height, width), self.max_side / max(height, width))
        return max(1, to_int(height * scale)), max(1, to_int(width * scale))

    def __call__(self, image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Resize an image (3, H, W) uint8 and its boxes (..., 4); an image that already has the size is returned as it is.

        Height and width are rounded separately, so boxes are scaled separately on each axis. `to_native` is the inverse.
        """
        height, width = image.shape[-2:]
        size = self.size(height, width)
        if size == (height, width):
            return image, boxes
        return resize(image, size, self.antialias), boxes * _ratio(size, (height, width), boxes)


def to_native(boxes: Tensor, size: Sequence[int], native_size: Sequence[int]) -> Tensor:
    """Scale boxes (..., 4) from a resized image of `size` (height, width, no padding) to pixels of the native image."""
    return boxes * _ratio(native_size, size, boxes)


def _ratio(size: Sequence[int], old: Sequence[int], like: Tensor) -> Tensor:
    """Return the factors by which XYXY boxes grow from `old` to `size` (height, width), as a tensor (4,) like `like`."""
    y, x = float(size[0]) / float(old[0]), float(size[1]) / float(old[1])
    return like.new_tensor([x, y, x, y])


def hflip(image: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Mirror an image and its boxes left to right."""
    width = image.shape[-1]
    x1, y1, x2, y2 = boxes.unbind(-1)
    return image.flip(-1), torch.stack([width - x2, y1, width - x1, y2], dim=-1)


def prepare(sample: Sample, resize: Resize, flip: bool) -> Item:
    """Resize a sample and, with `flip`, mirror it. Its proposals are transformed together with its ground-truth boxes."""
    image = torch.from_numpy(sample.image).permute(2, 0, 1)
    boxes, objects = torch.from_numpy(sample.boxes), len(sample.boxes)
    if sample.proposals is not None:
        boxes = torch.cat([boxes, torch.from_numpy(sample.proposals)])
    image, boxes = resize(image, boxes)
    if flip:
        image, boxes = hflip(image, boxes)
    proposals = None if sample.proposals is None else boxes[objects:]
    labels, crowd = torch.from_numpy(sample.labels), torch.from_numpy(sample.crowd)
    masks = None
    if sample.masks is not None:
        native_size, size = sample.image.shape[:2], (image.shape[1], image.shape[2])
        masks = ObjectMasks(sample.masks, native_size, size, flip)
    return Item(image, boxes[:objects], labels, crowd, sample.image_id, proposals, masks)


def collate(items: Sequence[Item]) -> Batch:
    """Stack items as a batch, padded to common shapes. Either all items have proposals or none has; the same of masks.

    Images are padded with 0 at the right and the bottom to a multiple of DIVISOR, objects to the largest G and proposals to
    the largest P (which may be 0).
    """
    height, width = (math.ceil(max(item.image.shape[axis] for item in items) / DIVISOR) * DIVISOR for axis in (1, 2))
    boxes, real = _padded([item.boxes for item in items])
    crowd = pad_sequence([item.crowd for item in items], batch_first=True)
    proposals, proposals_valid = None, None
    if any(item.proposals is not None for item in items):
        proposals, proposals_valid = _padded([item.proposals for item in items])
    dtype = reduce(torch.promote_types, (item.image.dtype for item in items))
    images = torch.zeros(len(items), 3, height, width, dtype=dtype)
    for image, item in zip(images, items, strict=True):
        image[:, : item.image.shape[1], : item.image.shape[2]] = item.image
    return Batch(
        images=images,
        sizes=torch.tensor([item.image.shape[1:] for item in items], dtype=torch.int64),
        boxes=boxes,
        labels=pad_sequence([item.labels for item in items], batch_first=True),
        valid=real & ~crowd,
        crowd=crowd,
        image_ids=[item.image_id for item in items],
        proposals=proposals,
        proposals_valid=proposals_valid,
        masks=[item.masks for item in items] if items[0].masks is not None else None,
    )


def _padded(boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Pad N tensors (B_n, 4) to boxes (N, B, 4) and a mask (N, B) of the real ones, B being the largest B_n."""
    mask = pad_sequence([torch.ones(len(of_image), dtype=torch.bool) for of_image in boxes], batch_first=True)
    return pad_sequence(list(boxes), batch_first=True), mask

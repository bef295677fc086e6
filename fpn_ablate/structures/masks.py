"""Masks of objects in a batch. They stay run lengths of the native image until a region is rasterised, so memory stays bounded.

Shape letters: G objects of an image, M regions, R x R bins. Boxes are XYXY in absolute pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
import torchvision  # noqa: F401 (registers its operators)
from torch import Tensor

from fpn_ablate.utils import rle
from fpn_ablate.utils.rle import Size

# In place of torchvision.ops.roi_align, which computes far more where torch is to be deterministic; masks need no gradient.
_roi_align = torch.ops.torchvision.roi_align
PIXELS_AT_ONCE = 2**23  # of bitmaps in memory together: 32 MiB


@dataclass(frozen=True)
class ObjectMasks:
    """The masks of an image's G objects, and what was done to the image.

    Attributes:
        counts: G masks (`utils.rle`), in pixels of the native image.
        native_size, size: (height, width) of the native image and of the network's input, without padding.
        flipped: the input is mirrored left to right.
    """

    counts: Sequence[bytes]
    native_size: Size
    size: Size
    flipped: bool = False

    def crop(self, objects: Tensor, boxes: Tensor, resolution: int, aligned: bool = True) -> Tensor:
        """Return the share (M, R, R) of each bin of a box that its object covers; outside of the image nothing is covered.

        Args:
            objects: (M,) indices of objects, best on the host, where run lengths are decoded.
            boxes: (M, 4) in pixels of the network's input; they may reach outside of the image.
            resolution: R.
            aligned: a pixel's value belongs to its centre; False: to its corner, as in torchvision.
        """
        boxes = self._to_native(boxes)
        if self.flipped and not aligned:  # the corner of a mirrored pixel is its other one
            boxes = boxes - boxes.new_tensor([1, 0, 1, 0])
        out = boxes.new_zeros(len(boxes), resolution, resolution)
        used, which = objects.cpu().unique(return_inverse=True)
        at_once = max(1, PIXELS_AT_ONCE // (self.native_size[0] * self.native_size[1]))
        for start in range(0, len(used), at_once):
            counts = [self.counts[g] for g in used[start : start + at_once].tolist()]
            bitmaps = torch.from_numpy(rle.decode(counts, self.native_size)).to(boxes.device, non_blocking=True)
            regions = ((start <= which) & (which < start + len(counts))).nonzero()[:, 0]
            bitmap, regions = ((x.to(boxes.device, non_blocking=True)) for x in (which[regions] - start, regions))
            rois = torch.cat([bitmap[:, None].to(boxes.dtype), boxes[regions]], 1)
            out[regions] = _roi_align(bitmaps[:, None].to(boxes.dtype), rois, 1.0, resolution, resolution, -1, aligned)[:, 0]
        return out.flip(-1) if self.flipped else out

    def _to_native(self, boxes: Tensor) -> Tensor:
        x1, y1, x2, y2 = boxes.unbind(-1)
        if self.flipped:
            x1, x2 = self.size[1] - x2, self.size[1] - x1
        x, y = self.native_size[1] / self.size[1], self.native_size[0] / self.size[0]
        return torch.stack([x1 * x, y1 * y, x2 * x, y2 * y], -1)


def crop(
    masks: Sequence[ObjectMasks], image: Tensor, objects: Tensor, boxes: Tensor, resolution: int, aligned: bool = True
) -> Tensor:
    """Crop regions of a batch as `ObjectMasks.crop` does: (M, R, R), with one wait for a GPU.

    Args:
        masks: of N images.
        image, objects: (M,) indices of images, ascending, and of objects in their image.
        boxes: (M, 4).
    """
    image, objects = torch.stack([image, objects]).cpu()
    counts = image.bincount(minlength=len(masks)).tolist()
    of_images = zip(masks, objects.split(counts), boxes.split(counts), strict=True)
    return torch.cat([mask.crop(own, regions, resolution, aligned) for mask, own, regions in of_images])


def paste(probabilities: Tensor, boxes: Tensor, size: Size, threshold: float = 0.5) -> list[bytes]:
    """Resize masks (M, R, R) of probabilities to boxes (M, 4) in an image of `size`; encode what is above `threshold`.

    Bilinear between the centres of bins, at the centres of pixels. Only a box's own pixels are computed and set in one bitmap
    of the image: 1,000 masks in 640 x 480 pixels take 0.4 s on a core, and 5 s where each is resized to the whole image.
    """
    bitmap = np.zeros(size, np.uint8, order="F")  # COCO's run lengths go down the columns
    pasted: list[bytes] = []
    for mask, (x1, y1, x2, y2) in zip(probabilities.cpu()[:, None, None].to(boxes.dtype), boxes.tolist(), strict=True):
        left, top = max(0, math.floor(x1)), max(0, math.floor(y1))
        right, bottom = max(left, min(size[1], math.ceil(x2))), max(top, min(size[0], math.ceil(y2)))
        window = bitmap[top:bottom, left:right]
        if window.size:
            x, y = (torch.arange(*ends, dtype=boxes.dtype) + 0.5 for ends in ((left, right), (top, bottom)))
            u, v = (x - x1) / (x2 - x1) * 2 - 1, (y - y1) / (y2 - y1) * 2 - 1  # (W,), (H,): -1..1 within the box
            grid = torch.stack(torch.broadcast_tensors(u, v[:, None]), -1)[None]
            window[:] = F.grid_sample(mask, grid, align_corners=False)[0, 0] > threshold
        pasted += rle.encode(bitmap[None])
        window[:] = 0
    return pasted

"""Resize images as tensors. Images are (..., 3, H, W), uint8 or float32 in 0..255."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as v2


def resize(images: Tensor, size: Sequence[int], antialias: bool) -> Tensor:
    """Resize images bilinearly to `size` (height, width).

    Without antialiasing the result is float32, as torchvision's detectors have it: they do not round its values.
    """
    if antialias:
        return v2.resize(images, list(size), interpolation=InterpolationMode.BILINEAR, antialias=True)
    batch = images if images.dim() == 4 else images[None]
    resized = F.interpolate(batch.float(), size=tuple(size), mode="bilinear", align_corners=False)
    return resized.view(*images.shape[:-2], *size)

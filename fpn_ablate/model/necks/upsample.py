"""Upsample maps of the top-down path: bilinear and learned. Nearest, the paper's, is torch's own.

Shape letters: N images, C channels, H x W cells before, H' x W' cells after.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor, nn


class Deconvolution(nn.ConvTranspose2d):
    """Learned 2x upsampling, cut to the requested size (odd sizes: ceil(H / 2) * 2 >= H).

    Args:
        start: "bilinear" (Long et al. 2015, Sec. 3.3) or "random" weights.
    """

    def __init__(self, channels: int, start: Literal["bilinear", "random"]) -> None:
        super().__init__(channels, channels, kernel_size=4, stride=2, padding=1, bias=False)
        self.start = start

    def init_parameter(self, layer: nn.Module, parameter: Tensor, generator: torch.Generator) -> bool:
        """Start as bilinear interpolation of each channel by itself, the border taken for 0; or draw Xavier weights."""
        if self.start == "bilinear":
            hat = parameter.new_tensor([0.25, 0.75, 0.75, 0.25])
            parameter.data.zero_().diagonal().copy_((hat[:, None] * hat)[..., None])
        else:  # each output pixel of a 4x4 kernel of stride 2 sees 4 of its 16 taps
            bound = (6 / (4 * (self.in_channels + self.out_channels))) ** 0.5
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
        return True

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:  # type: ignore[override]
        return super().forward(x)[..., : size[0], : size[1]]


def bilinear(x: Tensor, size: Sequence[int]) -> Tensor:
    """Interpolate (N, C, H, W) to `size` (H', W') with half-pixel centres: F.interpolate's values with align_corners=False.

    F.interpolate itself is not repeatable on a GPU: its backward adds in no fixed order, and deterministic mode replaces it by
    other, slower code. A comparison of ways to upsample would also be one of repeatable and unrepeatable runs. Two products
    with matrices are repeatable in either mode, and faster than gathers (channels_last on a CPU).
    """
    n, c, h, w = x.shape
    rows, columns = (_hat(a, b, x.device, x.dtype) for a, b in zip((h, w), size, strict=True))
    y = rows @ x.permute(0, 2, 3, 1).reshape(n, h, w * c)
    return (columns @ y.view(n, size[0], w, c)).permute(0, 3, 1, 2)


@lru_cache(maxsize=64)
def _hat(before: int, after: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the weights (after, before) of each pixel of `before` in each of `after`."""
    # Cached, and an inference tensor could not be used in training later.
    with torch.inference_mode(False):
        pixels = torch.arange(before, dtype=torch.float64, device="cpu")
        centres = (torch.arange(after, dtype=torch.float64, device="cpu") + 0.5) * (before / after) - 0.5
        distance = (centres.clamp(0, before - 1)[:, None] - pixels).abs()
        return (1 - distance).clamp(min=0).to(device, dtype)

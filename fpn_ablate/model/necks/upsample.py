"""Upsample maps of the top-down path: bilinear, deconvolution, CARAFE. Nearest, the paper's, is torch's own.

Shape letters: N images, C channels, H x W cells before, H' x W' cells after.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
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


class CARAFE(nn.Module):
    """2x upsampling by kernels that are predicted from the map (Wang et al., ICCV 2019, arXiv:1905.02188).

    Each new pixel is a weighted mean of the 5x5 pixels around the old one. A 1x1 convolution to 64 channels, a 3x3 and a
    softmax predict the weights.
    """

    def __init__(self, channels: int, compressed: int = 64, kernel: int = 5) -> None:
        super().__init__()
        self.kernel = kernel
        self.compress = nn.Conv2d(channels, compressed, 1)
        self.encode = nn.Conv2d(compressed, 4 * kernel**2, 3, padding=1)

    def init_parameter(self, layer: nn.Module, parameter: Tensor, generator: torch.Generator) -> bool:
        """Draw the encoder's weights small, so that upsampling starts as a mean over the window; leave the others to Xavier."""
        if layer is not self.encode or parameter.dim() < 2:
            return False
        nn.init.normal_(parameter, std=0.001, generator=generator)
        return True

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """Upsample (N, C, H, W) to `size`, at most twice as large; odd sizes are cut."""
        n, channels, height, width = x.shape
        # Four fine cells for each coarse one, in pixel_shuffle's order.
        weights = self.encode(self.compress(x)).view(n, -1, 4, height * width).softmax(1)  # (N, 25, 4, HW)
        windows = F.unfold(x, self.kernel, padding=self.kernel // 2).view(n, channels, -1, height * width)
        # One product for each cell: multiplying whole maps takes 25 times the memory of the output, and minutes on a CPU.
        fine = torch.einsum("ncki,nkfi->ncfi", windows, weights).reshape(n, 4 * channels, height, width)
        return F.pixel_shuffle(fine, 2)[..., : size[0], : size[1]]


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

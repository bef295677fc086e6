"""What several tests of the model share."""

import pytest
import torch

from fpn_ablate.model import matching


@pytest.fixture
def double(monkeypatch):
    """Compute in double precision: no rounding ties two scores, flips a ReLU (which moves a gradient by 1e-4) or hides a
    difference. torchvision's ratio of sizes stays float32."""
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.is_floating_point() else x.double())
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=[False, True], ids=["at once", "image by image"])
def at_once_and_image_by_image(request, monkeypatch):
    """Let matchers compare a batch at once, then image by image as where memory is short."""
    if request.param:
        monkeypatch.setitem(matching.MAX_PAIRS, "cpu", 0)

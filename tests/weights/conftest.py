"""Networks of two programs with random weights, as files."""

import pytest
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

from fpn_ablate.model.build import build_detector

WIDTH = 256 * 49
SCRATCH = ("backbone.weights=none", "backbone.freeze_at=0", "backbone.frozen_bn=false")
JOINT = ("task=faster_rcnn", "task.training=joint", "neck.channels=256", "task.roi.fc_dim=16", *SCRATCH)
C4 = ("ablation=c4", "task=faster_rcnn", "task.training=joint", *SCRATCH)


def randomise(net: nn.Module, seed: int = 0) -> nn.Module:
    """Values that are neither 0 nor 1, small enough for features of a moderate size."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in net.state_dict().items():
        if value.is_floating_point():
            low, high = (0.5, 1.5) if "running_var" in name else (-0.05, 0.05)
            value.uniform_(low, high, generator=generator)
            if value.dim() == 1 and name.endswith("weight"):
                value.add_(1)
    return net.eval()


def torchvisions(backbone: str = "resnet18", rows: int = 4, seed: int = 0) -> FasterRCNN:
    trunk = resnet_fpn_backbone(backbone_name=backbone, weights=None)
    return randomise(FasterRCNN(trunk, box_head=TwoMLPHead(WIDTH, 16), box_predictor=FastRCNNPredictor(16, rows)), seed)


@pytest.fixture(scope="session")
def ours(config):
    """`ours(3, "backbone=resnet18")` -> our Detector of 3 classes, with random weights."""

    def build(classes: int, *overrides: str, seed: int = 1, **how) -> nn.Module:
        return randomise(build_detector(config(*overrides), num_classes=classes, **how), seed)

    return build


@pytest.fixture(scope="session")
def torchvision_file(tmp_path_factory):
    """The file of a detector of torchvision with ResNet-18, and its state dict."""
    path = tmp_path_factory.mktemp("torchvision") / "detector.pth"
    state = torchvisions().state_dict()
    torch.save(state, path)
    return path, state


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())

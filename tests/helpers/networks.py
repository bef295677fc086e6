"""Networks with random weights: torchvision's, and any of ours."""

from pathlib import Path

import torch
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

from fpn_ablate.config.schema import Config
from fpn_ablate.model.build import build_detector
from fpn_ablate.model.detectors.two_stage import Detector
from fpn_ablate.model.init import initialise
from fpn_ablate.weights.backbone import backbone_weights, load_backbone
from fpn_ablate.weights.convert import Options
from fpn_ablate.weights.loading import fit_to_model


def randomise(net: nn.Module, seed: int = 0, scale: float = 0.05) -> nn.Module:
    """Values that are neither 0 nor 1, small enough for features of a moderate size."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in net.state_dict().items():
        if value.is_floating_point():
            low, high = (0.5, 1.5) if "running_var" in name else (-scale, scale)
            value.uniform_(low, high, generator=generator)
            if value.dim() == 1 and name.endswith("weight"):
                value.add_(1)
    return net.eval()


def randomised(net: nn.Module) -> nn.Module:
    """Random values in double precision, in which two orders of the same sums agree closely."""
    return randomise(net, scale=0.1).double()


def loaded_backbone(cfg: Config) -> nn.Module:
    """The row's backbone with the weights that its configuration names, in double precision."""
    model = build_detector(cfg)
    initialise(model, 0)
    load_backbone(model, backbone_weights(cfg.backbone, None))
    return model.backbone.eval().double()


def torchvision_detector(backbone: str = "resnet18", classes: int = 3) -> FasterRCNN:
    """A detector of torchvision with a head of 16 channels; `classes` without the background."""
    trunk = resnet_fpn_backbone(backbone_name=backbone, weights=None)
    head, predictor = TwoMLPHead(256 * 49, 16), FastRCNNPredictor(16, classes + 1)
    return randomise(FasterRCNN(trunk, box_head=head, box_predictor=predictor))


def load(model: Detector, path: Path, options: Options | None = None) -> list[str]:
    """Load a file of weights into a detector, which must fit; return the notes for the user."""
    weights = fit_to_model(model, path, options)
    model.load_state_dict(weights.tensors, strict=False)  # nothing is missing except batch counters
    return weights.notes

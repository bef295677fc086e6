"""Load the weights that a backbone starts from."""

import hashlib
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from fpn_ablate.config.schema import AnyBackbone, TimmBackbone
from fpn_ablate.model.backbones.timm import timm_backbone
from fpn_ablate.model.build import build_backbone
from fpn_ablate.model.detectors.two_stage import Detector
from fpn_ablate.model.heads.box_head import Conv5
from fpn_ablate.utils.errors import UserError, first_line
from fpn_ablate.weights.files import Stored, read
from fpn_ablate.weights.layout import shapes_of
from fpn_ablate.weights.loading import backbone_of
from fpn_ablate.weights.timm import timm_weights


def backbone_weights(cfg: AnyBackbone, pretrained: Path | None) -> dict[str, Tensor] | None:
    """The state dict that the backbone starts from, in our names; None: random. `pretrained` belongs to weights=pretrain."""
    source = cfg.weights
    if source == "none":
        return None
    if source == "pretrain":
        assert pretrained is not None, "weights=pretrain needs the file that pretrain.ensure made"
        return torch.load(pretrained, weights_only=True, map_location="cpu")
    if source != "imagenet":
        return _from_file(cfg, Path(source))
    if isinstance(cfg, TimmBackbone):
        return timm_backbone(cfg.model, pretrained=True).state_dict()
    try:
        state = torchvision.models.get_model_weights(cfg.name).DEFAULT.get_state_dict(progress=False)
    except (OSError, RuntimeError) as error:  # no network, or a file that was damaged on the way
        raise UserError(
            f"backbone.weights=imagenet: torchvision's weights of {cfg.name} cannot be had ({first_line(error)}). "
            "They are downloaded once; without a network give backbone.weights=FILE with a state dict of torchvision's"
        ) from None
    return backbone_of(Stored(Path(source), state), cfg.name, shapes_of(build_backbone(cfg).state_dict()))


def _from_file(cfg: AnyBackbone, path: Path) -> dict[str, Tensor]:
    try:
        if not path.exists():
            raise UserError(f"{path}: no such file; give a file of weights, or none, pretrain, imagenet")
        if isinstance(cfg, TimmBackbone):
            return timm_weights(cfg.model, path, read(path).tensors)
        wanted = shapes_of(build_backbone(cfg).state_dict())
        return backbone_of(read(path), cfg.name, wanted, cfg.stride_in_1x1)
    except UserError as error:
        raise UserError(f"backbone.weights={error}") from None


def load_backbone(detector: Detector, state: dict[str, Tensor]) -> None:
    """Fill the backbone, and conv5 where it is the head; frozen BN has no batch counter, everything else must be there."""
    _load_matching(detector.backbone, state)
    if detector.roi and isinstance(detector.roi.box_head, Conv5):
        prefix = "stages.c5."
        _load_matching(
            detector.roi.box_head.stage, {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        )


def _load_matching(module: nn.Module, state: dict[str, Tensor]) -> None:
    own = module.state_dict()
    module.load_state_dict({k: v for k, v in state.items() if k in own})


def weights_digest(state: dict[str, Tensor] | None) -> str:
    """sha256 over names and values: which weights a run started from."""
    sha = hashlib.sha256()
    for name, value in sorted((state or {}).items()):
        sha.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()

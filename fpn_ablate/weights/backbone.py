"""Get the weights that a backbone starts from: none, the package's, pre-trained ones, ImageNet's, or a file's."""

import hashlib
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from fpn_ablate.config.parts import AnyBackbone, TimmBackbone
from fpn_ablate.model.backbones.timm import timm_backbone
from fpn_ablate.model.build import build_backbone
from fpn_ablate.model.detectors.two_stage import Detector
from fpn_ablate.utils.errors import UserError, first_line
from fpn_ablate.weights.files import Stored, read
from fpn_ablate.weights.loading import backbone_of, print_notes
from fpn_ablate.weights.timm import timm_weights


def backbone_weights(cfg: AnyBackbone, pretrained: Path | None) -> dict[str, Tensor] | None:
    """Return the state dict that the backbone starts from, in our names, or None for random weights.

    Args:
        pretrained: the file of weights=shipped or pretrain.

    Raises:
        UserError: ImageNet's weights cannot be downloaded, or the file does not fit the backbone.
    """
    source = cfg.weights
    if source == "none":
        return None
    if source == "pretrain":
        assert pretrained is not None, "weights=pretrain needs the file that pretrain.load_or_pretrain made"
        return read(pretrained).tensors
    if source != "imagenet":
        return _from_file(cfg, pretrained or Path(source))
    return imagenet_weights(cfg)


def missing_download(cfg: AnyBackbone) -> str | None:
    """Return the address that ImageNet's weights of a torchvision backbone are yet to be downloaded from, or None."""
    if cfg.weights != "imagenet" or isinstance(cfg, TimmBackbone):
        return None
    url = torchvision.models.get_model_weights(cfg.name).DEFAULT.url
    return None if Path(torch.hub.get_dir(), "checkpoints", Path(url).name).is_file() else url


def imagenet_weights(cfg: AnyBackbone) -> dict[str, Tensor]:
    """Return ImageNet's weights of a backbone in our names; they are downloaded unless they were before.

    Raises:
        UserError: they cannot be downloaded.
    """
    if isinstance(cfg, TimmBackbone):
        return timm_backbone(cfg, pretrained=True).state_dict()
    weights = torchvision.models.get_model_weights(cfg.name).DEFAULT
    try:
        state = weights.get_state_dict(progress=False)
    except (OSError, RuntimeError) as error:  # no network, or a file damaged by the download
        raise UserError(
            f"backbone.weights=imagenet: {weights.url} cannot be downloaded ({first_line(error)}). Download it elsewhere and "
            "set backbone.weights=FILE, or start from random weights: "
            "backbone.weights=none backbone.freeze_at=0 backbone.frozen_bn=false"
        ) from None
    return backbone_of(Stored(Path("imagenet"), state), cfg.name, build_backbone(cfg).state_dict())


def _from_file(cfg: AnyBackbone, path: Path) -> dict[str, Tensor]:
    try:
        if not path.exists():
            raise UserError(f"{path}: no such file; give a file of weights, or none, shipped, pretrain, imagenet")
        stored = read(path)
        if isinstance(cfg, TimmBackbone):
            print_notes(path, stored.notes)
            return timm_weights(cfg, path, stored.tensors)
        stride_in_1x1 = getattr(cfg, "stride_in_1x1", False)
        return backbone_of(stored, cfg.label, build_backbone(cfg).state_dict(), stride_in_1x1)
    except UserError as error:
        raise UserError(f"backbone.weights={error}") from None


def load_backbone(detector: Detector, state: dict[str, Tensor]) -> None:
    """Load `state` into the backbone, and the stage that the box head holds into that."""
    for prefix, module in detector.backbone_parts.items():
        _load_matching(module, {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})


def _load_matching(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Load the part of `state` that `module` has, which must be all of the module. Frozen batch norms have no batch counter."""
    names = module.state_dict()
    module.load_state_dict({k: v for k, v in state.items() if k in names})


def weights_digest(state: dict[str, Tensor] | None) -> str:
    """Return the sha256 of names and values, which identifies the weights that a run started from."""
    sha = hashlib.sha256()
    for name, value in sorted((state or {}).items()):
        sha.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()

"""From a validated configuration to modules with their initial weights."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from fpn_ablate.errors import UserError, first_line
from fpn_ablate.model.backbone import BACKBONES, Backbone, fold_batch_norm, freeze_batch_norm, stride_to_1x1
from fpn_ablate.model.detector import Detector
from fpn_ablate.model.layers import quicken
from fpn_ablate.model.levels import Level
from fpn_ablate.model.neck import FPN, Deconvolution, SingleLevel
from fpn_ablate.model.pool import RoIPooler
from fpn_ablate.model.roi import Conv5, RoIHeads, RoISettings, TwoFC
from fpn_ablate.model.rpn import RPN, RPNSettings
from fpn_ablate.model.timm_backbone import timm_backbone, timm_weights
from fpn_ablate.schema import AnyBackbone, Config, FPNNeck, TimmBackbone
from fpn_ablate.seeding import torch_generator
from fpn_ablate.weights.files import Stored, read
from fpn_ablate.weights.layout import shapes_of
from fpn_ablate.weights.loading import backbone_of

# The paper's sizes in pixels are those of an image with this short side (Sec. 5); they scale with recipe.short_side.
PAPER_SHORT_SIDE = 800
# What a network of each task has. Trained apart (task.training=separate), the RPN of Faster R-CNN is a network of its own.
PARTS = {"rpn": ("rpn",), "fast_rcnn": ("roi",), "faster_rcnn": ("rpn", "roi")}


def rpn_settings(cfg: Config, short_side: int) -> RPNSettings:
    """The RPN's numbers for inputs of `short_side` pixels."""
    head = cfg.head
    return RPNSettings(
        sizes=tuple(size * short_side / PAPER_SHORT_SIDE for size in head.anchor_sizes),
        ratios=head.anchor_ratios,
        anchor_grid=head.anchor_grid,
        positive_iou=head.positive_iou,
        negative_iou=head.negative_iou,
        samples=head.samples,
        positive_fraction=head.positive_fraction,
        pre_nms_topk=head.pre_nms_topk,
        pre_nms_topk_single=head.pre_nms_topk_single,
        # A second stage that is trained together with the RPN reads no more than it uses.
        post_nms_topk=cfg.task.roi.proposals if _joint(cfg) else head.post_nms_topk,
        nms_thresh=head.nms_thresh,
    )


def _joint(cfg: Config) -> bool:
    return cfg.task.name == "faster_rcnn" and cfg.task.training == "joint"


def build_backbone(cfg: AnyBackbone) -> Backbone:
    """The backbone that is asked for, all of it trained and its batch statistics running."""
    if isinstance(cfg, TimmBackbone):
        return timm_backbone(cfg.model)
    backbone = BACKBONES[cfg.name]()
    if cfg.stride_in_1x1:
        stride_to_1x1(backbone)
    return backbone


def build_neck(cfg: Config, backbone: Backbone) -> nn.Module:
    neck = cfg.neck
    if isinstance(neck, FPNNeck):
        return FPN(backbone.levels, **neck.model_dump(exclude={"name"}))
    return SingleLevel(backbone.levels, neck.level)


def build_roi(
    cfg: Config, backbone: Backbone, behind: dict[str, nn.Module], levels: Sequence[Level], num_classes: int, short_side: int
) -> RoIHeads:
    """The second stage on `levels`; `behind`: stages of the backbone that the neck does not read."""
    roi, scale = cfg.task.roi, short_side / PAPER_SHORT_SIDE
    conv5 = roi.head == "conv5" or (roi.head == "auto" and [level.name for level in levels] == ["c4"])
    pooler = RoIPooler(
        levels,
        resolution=roi.conv5_resolution if conv5 else roi.resolution,
        pooling=roi.pooling,
        sampling_ratio=roi.sampling_ratio,
        canonical_level=roi.canonical_level,
        canonical_box_size=roi.canonical_box_size * scale,
    )
    if conv5 and not any(True for _ in behind["c5"].parameters()):
        raise UserError(f"backbone={cfg.backbone.label} has nothing but pooling behind C4 for a head: set task.roi.head=2fc")
    head = Conv5(behind["c5"], backbone.out_channels) if conv5 else TwoFC(pooler.in_channels, pooler.resolution, roi.fc_dim)
    settings = RoISettings(**roi.model_dump(include=set(RoISettings.__dataclass_fields__)))
    return RoIHeads(pooler, head, num_classes, settings)


def build_detector(
    cfg: Config, *, num_classes: int = 1, parts: Sequence[str] | None = None, short_side: int | None = None
) -> Detector:
    """The modules of a row, without weights of their own yet.

    Args:
        num_classes: K of the second stage.
        parts: of "rpn" and "roi" what is built; by default what runs in one network of the task.
        short_side: by default the recipe's.
    """
    parts = PARTS[cfg.task.name] if parts is None else parts
    short_side = short_side or cfg.recipe.short_side
    backbone = build_backbone(cfg.backbone)
    if cfg.backbone.frozen_bn:
        freeze_batch_norm(backbone)
    backbone.freeze(cfg.backbone.freeze_at)
    if not isinstance(cfg.backbone, TimmBackbone):
        fold_batch_norm(backbone)
    neck = build_neck(cfg, backbone)
    behind = backbone.truncate(neck.deepest)
    rpn = RPN(neck.levels, rpn_settings(cfg, short_side)) if "rpn" in parts else None
    roi = build_roi(cfg, backbone, behind, neck.levels, num_classes, short_side) if "roi" in parts else None
    return quicken(Detector(backbone, neck, rpn, roi))


def initialise(model: nn.Module, seed: int) -> None:
    """Draw every parameter from a generator of its own, keyed by its name: rows share what they share by name and shape.

    Detectron's defaults (not in the paper): Xavier with bias 0 in the neck and the fully connected layers, Gaussian 0.01 in the
    RPN and for class scores, 0.001 for the box deltas of the second stage; He in a backbone, to which conv5 as a head belongs.
    """
    for owner, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{owner}.{name}"
            generator = torch_generator(seed, "init", full)
            if parameter.dim() < 2:  # a bias, or the scale of a norm or of a layer
                nn.init.constant_(parameter, float(not name.endswith("bias")))
            elif full.startswith("rpn."):
                nn.init.normal_(parameter, std=0.01, generator=generator)
            elif full.startswith("roi.predictor."):
                nn.init.normal_(parameter, std=0.001 if "deltas" in full else 0.01, generator=generator)
            elif full.startswith(("backbone.", "roi.box_head.stage.")) and isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(parameter, mode="fan_out", generator=generator)
            elif isinstance(module, Deconvolution):
                # Each output pixel of a 4x4 stride-2 kernel sees 4 of its 16 taps.
                bound = (6 / (4 * (module.in_channels + module.out_channels))) ** 0.5
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
            else:
                nn.init.xavier_uniform_(parameter, generator=generator)


def backbone_weights(cfg: Config, pretrained: Path | None) -> dict[str, Tensor] | None:
    """The state dict that the backbone starts from, in our names; None: random. `pretrained` belongs to weights=pretrain."""
    source = cfg.backbone.weights
    if source == "none":
        return None
    if source == "pretrain":
        assert pretrained is not None, "weights=pretrain needs the file that pretrain.ensure made"
        return torch.load(pretrained, weights_only=True, map_location="cpu")
    if source != "imagenet":
        return _from_file(cfg, Path(source))
    if isinstance(cfg.backbone, TimmBackbone):
        return timm_backbone(cfg.backbone.model, pretrained=True).state_dict()
    try:
        state = torchvision.models.get_model_weights(cfg.backbone.name).DEFAULT.get_state_dict(progress=False)
    except (OSError, RuntimeError) as error:  # no network, or a file that was damaged on the way
        raise UserError(
            f"backbone.weights=imagenet: torchvision's weights of {cfg.backbone.name} cannot be had ({first_line(error)}). "
            "They are downloaded once; without a network give backbone.weights=FILE with a state dict of torchvision's"
        ) from None
    return backbone_of(Stored(Path(source), state), cfg.backbone.name, shapes_of(build_backbone(cfg.backbone).state_dict()))


def _from_file(cfg: Config, path: Path) -> dict[str, Tensor]:
    try:
        if not path.exists():
            raise UserError(f"{path}: no such file; give a file of weights, or none, pretrain, imagenet")
        if isinstance(cfg.backbone, TimmBackbone):
            return timm_weights(cfg.backbone.model, path, read(path).tensors)
        wanted = shapes_of(build_backbone(cfg.backbone).state_dict())
        return backbone_of(read(path), cfg.backbone.name, wanted, cfg.backbone.stride_in_1x1)
    except UserError as error:
        raise UserError(f"backbone.weights={error}") from None


def load_backbone(detector: Detector, state: dict[str, Tensor]) -> None:
    """Fill the backbone, and conv5 where it is the head; frozen BN has no batch counter, everything else must be there."""
    _fill(detector.backbone, state)
    if detector.roi and isinstance(detector.roi.box_head, Conv5):
        prefix = "stages.c5."
        _fill(detector.roi.box_head.stage, {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})


def _fill(module: nn.Module, state: dict[str, Tensor]) -> None:
    own = module.state_dict()
    module.load_state_dict({k: v for k, v in state.items() if k in own})


def digest(state: dict[str, Tensor] | None) -> str:
    """sha256 over names and values: which weights a run started from."""
    sha = hashlib.sha256()
    for name, value in sorted((state or {}).items()):
        sha.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()

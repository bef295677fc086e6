"""Build the modules of a row from its validated configuration. Weights follow: `init.initialise`, `weights.backbone`."""

from collections.abc import Sequence
from functools import partial

import torch

from fpn_ablate.config import user_parts
from fpn_ablate.config.schema import AnyBackbone, AnyNeck, Config, RoI, RPNConfig, TimmBackbone, UserPart
from fpn_ablate.model import anchors, contracts
from fpn_ablate.model.backbones.base import Backbone
from fpn_ablate.model.backbones.batch_norm import freeze_batch_norm
from fpn_ablate.model.detectors.two_stage import Detector
from fpn_ablate.model.heads.box_head import Conv5Stage
from fpn_ablate.model.heads.roi import RoIHeads
from fpn_ablate.model.heads.roi_pooler import RoIPooler
from fpn_ablate.model.heads.rpn import RPN
from fpn_ablate.model.necks.base import Neck
from fpn_ablate.model.parts import BACKBONES, BOX_HEADS, NECKS, RPN_HEADS
from fpn_ablate.structures.levels import Level
from fpn_ablate.utils.errors import UserError

# Configurations whose parts have been checked in this process.
_checked: set[str] = set()
# Heads of each task's network. With task.training=separate the RPN of Faster R-CNN is another network.
HEADS = {"rpn": ("rpn",), "fast_rcnn": ("roi",), "faster_rcnn": ("rpn", "roi")}


def build_backbone(config: AnyBackbone) -> Backbone:
    """Build the backbone with every stage trainable and batch norms that are not frozen."""
    if isinstance(config, UserPart):
        return user_parts.build(config, "backbone")
    return BACKBONES[config.name](config)


def build_neck(config: AnyNeck, levels: Sequence[Level]) -> Neck:
    """Build the neck on a backbone's levels."""
    if isinstance(config, UserPart):
        return user_parts.build(config, "neck", levels)
    return NECKS[config.name](levels, config)


def build_rpn(config: RPNConfig, levels: Sequence[Level], short_side: int) -> RPN:
    """Build the RPN on a neck's levels, for images with this short side in pixels."""
    user = isinstance(config.head, UserPart)
    head = partial(user_parts.build, config.head, "rpn.head") if user else RPN_HEADS[config.head]
    return RPN(levels, config, short_side, head)


def build_roi(roi: RoI, levels: Sequence[Level], num_classes: int, short_side: int, conv5: Conv5Stage) -> RoIHeads:
    """Build the second stage on a neck's levels."""
    kind = roi.head
    if kind == "auto":
        kind = "conv5" if [level.name for level in levels] == ["c4"] else "2fc"
    built_in = None if isinstance(kind, UserPart) else BOX_HEADS[kind]
    pooler = RoIPooler(
        levels,
        resolution=roi.conv5_resolution if built_in and built_in.backbone_stage else roi.resolution,
        pooling=roi.pooling,
        sampling_ratio=roi.sampling_ratio,
        canonical_level=roi.canonical_level,
        canonical_box_size=anchors.scaled(roi.canonical_box_size, short_side),
    )
    shape = pooler.in_channels, pooler.resolution
    if built_in:
        box_head = built_in.from_config(roi, *shape, conv5)
    else:
        box_head = user_parts.build(kind, "task.roi.head", *shape)
    return RoIHeads(pooler, box_head, num_classes, roi)


def check(cfg: Config) -> None:
    """Check the contracts of a row's parts that are not built-in: a user's, and a network of timm.

    Raises:
        UserError: a part cannot be built, or breaks its contract; it names the part's key.
    """
    parts, timm = cfg.user_parts, isinstance(cfg.backbone, TimmBackbone)
    if not parts and not timm:
        return
    key = repr((cfg.backbone, cfg.neck, cfg.rpn, cfg.task, user_parts.describe(parts)))
    if key in _checked:
        return
    where = {name: f"{name}.class={part.label}" for name, part in parts.items()}
    with torch.device("meta"):
        backbone = build_backbone(cfg.backbone)
        if timm or "backbone" in parts:
            contracts.check_backbone(backbone, where.get("backbone", f"backbone={cfg.backbone.label}"))
        sizes = len(cfg.rpn.anchor_sizes)
        if "neck" in parts:
            rpn = sizes if cfg.procedure != "fast_rcnn" else None
            contracts.check_neck(build_neck(cfg.neck, backbone.levels), backbone.levels, where["neck"], rpn)
        if "task.proposals.neck" in parts:
            neck = build_neck(cfg.task.proposals.neck, backbone.levels)
            contracts.check_neck(neck, backbone.levels, where["task.proposals.neck"], sizes)
        levels = build_neck(cfg.neck, backbone.levels).levels
        if "rpn.head" in parts:
            rpn = build_rpn(cfg.rpn, levels, cfg.recipe.short_side)
            per_cell = len(rpn.level_sizes[0]) * len(cfg.rpn.anchor_ratios)
            contracts.check_rpn_head(rpn.head, levels[: len(rpn.level_sizes)], per_cell, where["rpn.head"])
        if "task.roi.head" in parts:
            roi = build_roi(cfg.task.roi, levels, 1, cfg.recipe.short_side, (None, 0))
            contracts.check_box_head(roi.box_head, roi.in_channels, roi.pooler.resolution, where["task.roi.head"])
    _checked.add(key)


def row_rpn(cfg: Config) -> RPNConfig:
    """Return the configuration of a row's RPN. Trained jointly, it proposes no more than the second stage uses."""
    if cfg.procedure == "joint":
        return cfg.rpn.model_copy(update={"post_nms_topk": cfg.task.roi.proposals})
    return cfg.rpn


def build_detector(
    cfg: Config, *, num_classes: int = 1, heads: Sequence[str] | None = None, short_side: int | None = None
) -> Detector:
    """Build the detector of a row; its weights are not initialised yet.

    Args:
        num_classes: K of the second stage.
        heads: the heads to build, of "rpn" and "roi"; by default those of the task's network.
        short_side: of the images, in pixels; by default the recipe's.

    Raises:
        UserError: as `check`; or conv5 is the head, and the backbone has only pooling there.
    """
    check(cfg)
    heads = HEADS[cfg.task.name] if heads is None else heads
    short_side = short_side or cfg.recipe.short_side
    backbone = build_backbone(cfg.backbone)
    if cfg.backbone.frozen_bn:
        freeze_batch_norm(backbone)
    backbone.freeze(cfg.backbone.freeze_at)
    neck = build_neck(cfg.neck, backbone.levels)
    removed = backbone.truncate(neck.deepest)
    rpn = build_rpn(row_rpn(cfg), neck.levels, short_side) if "rpn" in heads else None
    roi = None
    if "roi" in heads:
        conv5 = removed.get("c5"), backbone.out_channels
        roi = build_roi(cfg.task.roi, neck.levels, num_classes, short_side, conv5)
        if roi.box_head.backbone_stage and not any(True for _ in roi.box_head.parameters()):
            raise UserError(
                f"backbone={cfg.backbone.label} has only pooling behind C4, so there is no conv5 head: set task.roi.head=2fc"
            )
    return Detector(backbone, neck, rpn, roi)

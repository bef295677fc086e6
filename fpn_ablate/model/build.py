"""Build the modules of a row from its validated configuration. Weights follow: `init.initialise`, `weights.backbone`."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from fpn_ablate.config import user_parts
from fpn_ablate.config.parts import AnyBackbone, AnyNeck, MaskConfig, RoI, RPNConfig, TimmBackbone, UserPart
from fpn_ablate.config.schema import Config
from fpn_ablate.model import anchors, contracts
from fpn_ablate.model.backbones.base import Backbone
from fpn_ablate.model.backbones.batch_norm import freeze_batch_norm
from fpn_ablate.model.detectors.dense import DenseDetector
from fpn_ablate.model.detectors.segments import SegmentProposer
from fpn_ablate.model.detectors.two_stage import Detector
from fpn_ablate.model.heads.mask import MaskBranch
from fpn_ablate.model.heads.roi import RoIHeads
from fpn_ablate.model.heads.roi_pooler import RoIPooler
from fpn_ablate.model.heads.rpn import RPN
from fpn_ablate.model.heads.segments import SegmentHead
from fpn_ablate.model.necks.base import Neck
from fpn_ablate.model.parts import BACKBONES, BOX_HEADS, DENSE_HEADS, DETECTORS, MASK_HEADS, NECKS, RPN_HEADS
from fpn_ablate.structures.levels import Level
from fpn_ablate.utils.errors import UserError

# Configurations whose parts have been checked in this process.
_checked: set[str] = set()
# Heads of each task's network. With task.training=separate the RPN is another network.
HEADS = {
    "rpn": ("rpn",),
    "fast_rcnn": ("roi",),
    "faster_rcnn": ("rpn", "roi"),
    "mask_rcnn": ("rpn", "roi"),
    "segment_proposals": ("segments",),
    **dict.fromkeys(DENSE_HEADS, ("dense",)),
}


def build_backbone(config: AnyBackbone) -> Backbone:
    """Build the backbone with every stage trainable and batch norms that are not frozen."""
    if isinstance(config, UserPart):
        return _build_user_part(config, "backbone")
    return BACKBONES[config.name](config)


def build_neck(config: AnyNeck, levels: Sequence[Level], key: str = "neck") -> Neck:
    """Build the neck on a backbone's levels; `key` is its place in the configuration, for messages."""
    if isinstance(config, UserPart):
        return _build_user_part(config, key, levels)
    return NECKS[config.name](levels, config)


def build_rpn(config: RPNConfig, levels: Sequence[Level], short_side: int) -> RPN:
    """Build the RPN on a neck's levels, for images with this short side in pixels."""
    if isinstance(config.head, UserPart):
        head = partial(_build_user_part, config.head, "rpn.head")
    else:
        head = partial(RPN_HEADS[config.head], relu=config.relu, scores=config.scores)
    return RPN(levels, config, short_side, head)


def build_roi(
    roi: RoI,
    levels: Sequence[Level],
    num_classes: int,
    short_side: int,
    backbone: Backbone,
    conv5: nn.Module | None = None,
    mask: MaskConfig | None = None,
) -> RoIHeads:
    """Build the second stage on a neck's levels, with a mask branch if there is `mask`; `conv5` is the backbone's last stage
    where the neck does not read it."""
    kind = roi.head
    if kind == "auto":
        kind = "conv5" if conv5 and tuple(levels) == (backbone.levels[2],) else "2fc"
    built_in = None if isinstance(kind, UserPart) else BOX_HEADS[kind]

    def pooler_of(resolution: int, all_levels: bool = False) -> RoIPooler:
        box_size = anchors.scaled(roi.canonical_box_size, short_side)
        return RoIPooler(levels, resolution, roi.pooling, roi.sampling_ratio, roi.canonical_level, box_size, all_levels)

    resolution = roi.conv5_resolution if built_in and built_in.backbone_stage else roi.resolution
    pooler = pooler_of(resolution, roi.levels == "all")
    shape = pooler.in_channels, pooler.resolution
    if built_in:
        box_head = built_in.from_config(roi, *shape, (conv5, backbone.out_channels), pooler.views)
    else:
        box_head = _build_user_part(kind, "task.roi.head", *shape)
    branch = None
    if mask:
        # Behind conv5 it shares the box head's maps, which halve the resolution.
        own = None if box_head.backbone_stage else pooler_of(mask.resolution)
        shape = (own.in_channels, own.resolution) if own else (box_head.out_channels, math.ceil(pooler.resolution / 2))
        keys = mask if own else mask.model_copy(update={"convolutions": 0})
        head = MASK_HEADS[mask.head](keys, *shape, 1 if mask.class_agnostic else num_classes)
        branch = MaskBranch(head, own, mask)
    return RoIHeads(pooler, box_head, num_classes, roi, branch)


def _build_user_part(config: UserPart, key: str, *positional: Any) -> Any:
    """Construct a user's part; whatever its constructor draws, such as a random buffer, is the same in every run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return user_parts.build(config, key, *positional)


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
        levels, sizes = backbone.levels, len(cfg.level_sizes[1]) if cfg.level_sizes else None
        neck = rpn_neck = build_neck(cfg.neck, levels)
        if "neck" in parts:
            sizes_read = sizes if cfg.procedure != "fast_rcnn" else None
            contracts.check_neck(neck, levels, where["neck"], sizes_read, cfg.one_width)
        other = "task.proposals.neck"
        if other in cfg.parts:
            rpn_neck = build_neck(cfg.task.proposals.neck, levels, other)
        if other in parts:
            contracts.check_neck(rpn_neck, levels, where[other], sizes, cfg.rpn.shared)
        if "rpn.head" in parts:
            rpn = build_rpn(cfg.rpn, rpn_neck.levels, cfg.recipe.short_side)
            read = rpn_neck.levels[: len(rpn.level_sizes)]
            heads = [(rpn.head, read)] if cfg.rpn.shared else [(rpn.head.levels[level.name], [level]) for level in read]
            for (head, its_levels), of_cell in zip(heads, rpn.level_sizes, strict=False):
                contracts.check_rpn_head(head, its_levels, len(of_cell) * len(cfg.rpn.anchor_ratios), where["rpn.head"])
        if "task.roi.head" in parts:
            roi = build_roi(cfg.task.roi, neck.levels, 1, cfg.recipe.short_side, backbone)
            contracts.check_box_head(roi.box_head, roi.pooler.in_channels, roi.pooler.resolution, where["task.roi.head"])
        if timm or "backbone" in parts:  # last, for it takes stages out
            contracts.check_backbone(backbone, where.get("backbone", f"backbone={cfg.backbone.label}"))
    _checked.add(key)


def build_detector(
    cfg: Config, *, num_classes: int = 1, heads: Sequence[str] | None = None, short_side: int | None = None
) -> Detector:
    """Build the detector of a row; its weights are not initialised yet.

    Args:
        num_classes: K of the second stage, or of a dense head.
        heads: the heads to build, of "rpn" and "roi", or "segments" or "dense" alone; by default those of the task's network.
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
    if "segments" in heads:
        return SegmentProposer(backbone, neck, SegmentHead(neck.levels, cfg.task, short_side))
    if "dense" in heads:
        return DenseDetector(backbone, neck, DENSE_HEADS[cfg.task.name](neck.levels, cfg.task, num_classes, short_side))
    rpn = build_rpn(cfg.rpn, neck.levels, short_side) if "rpn" in heads else None
    roi = None
    if "roi" in heads:
        roi = build_roi(cfg.task.roi, neck.levels, num_classes, short_side, backbone, removed.get("c5"), cfg.mask)
        if roi.box_head.backbone_stage and not any(True for _ in roi.box_head.parameters()):
            raise UserError(
                f"backbone={cfg.backbone.label} has only pooling behind C4, so there is no conv5 head: set task.roi.head=2fc"
            )
    if cfg.image_pyramid:
        return DETECTORS["image_pyramid"](backbone, neck, rpn, roi, cfg.image_pyramid, short_side, cfg.recipe.antialias)
    return Detector(backbone, neck, rpn, roi)

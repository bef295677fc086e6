"""Build the modules of a row from its validated configuration. Weights follow: `init.initialise`, `weights.backbone`."""

from collections.abc import Sequence

from torch import nn

from fpn_ablate.config.schema import AnyBackbone, Config, FPNNeck, RoI, RPNConfig, SingleLevelNeck, TimmBackbone
from fpn_ablate.model.backbones.base import Backbone
from fpn_ablate.model.backbones.batch_norm import freeze_batch_norm
from fpn_ablate.model.backbones.registry import BACKBONES
from fpn_ablate.model.backbones.timm import timm_backbone
from fpn_ablate.model.backbones.torchvision import stride_to_1x1
from fpn_ablate.model.detectors.two_stage import Detector
from fpn_ablate.model.heads.box_head import Conv5, TwoFC
from fpn_ablate.model.heads.roi import RoIHeads, RoISettings
from fpn_ablate.model.heads.roi_pooler import RoIPooler
from fpn_ablate.model.heads.rpn import RPN, RPNSettings
from fpn_ablate.model.necks.registry import NECKS
from fpn_ablate.model.optimise import optimise
from fpn_ablate.structures.levels import Level
from fpn_ablate.utils.errors import UserError

# The paper's sizes in pixels are those of an image with this short side (Sec. 5); they scale with recipe.short_side.
PAPER_SHORT_SIDE = 800
# Heads of each task's network. With task.training=separate the RPN of Faster R-CNN is another network.
PARTS = {"rpn": ("rpn",), "fast_rcnn": ("roi",), "faster_rcnn": ("rpn", "roi")}


def rpn_settings(rpn: RPNConfig, short_side: int, post_nms_topk: tuple[int, int] | None = None) -> RPNSettings:
    """Return the RPN's numbers for inputs of `short_side` pixels; `post_nms_topk` replaces the configured one."""
    return RPNSettings(
        sizes=tuple(size * short_side / PAPER_SHORT_SIDE for size in rpn.anchor_sizes),
        ratios=rpn.anchor_ratios,
        anchor_grid=rpn.anchor_grid,
        positive_iou=rpn.positive_iou,
        negative_iou=rpn.negative_iou,
        samples=rpn.samples,
        positive_fraction=rpn.positive_fraction,
        pre_nms_topk=rpn.pre_nms_topk,
        pre_nms_topk_single=rpn.pre_nms_topk_single,
        post_nms_topk=post_nms_topk or rpn.post_nms_topk,
        nms_thresh=rpn.nms_thresh,
    )


def build_backbone(cfg: AnyBackbone) -> Backbone:
    """Build the backbone with every stage trainable and batch norms that are not frozen."""
    if isinstance(cfg, TimmBackbone):
        return timm_backbone(cfg.model)
    backbone = BACKBONES[cfg.name]()
    if cfg.stride_in_1x1:
        stride_to_1x1(backbone)
    return backbone


def build_neck(neck: FPNNeck | SingleLevelNeck, backbone: Backbone) -> nn.Module:
    """Build the neck on a backbone's levels."""
    return NECKS[neck.name](backbone.levels, **neck.model_dump(exclude={"name"}))


def build_roi(
    roi: RoI, backbone: Backbone, removed: dict[str, nn.Module], levels: Sequence[Level], num_classes: int, short_side: int
) -> RoIHeads:
    """Build the second stage on `levels`.

    Args:
        removed: stages of the backbone that the neck does not read.
    """
    scale = short_side / PAPER_SHORT_SIDE
    conv5 = roi.head == "conv5" or (roi.head == "auto" and [level.name for level in levels] == ["c4"])
    pooler = RoIPooler(
        levels,
        resolution=roi.conv5_resolution if conv5 else roi.resolution,
        pooling=roi.pooling,
        sampling_ratio=roi.sampling_ratio,
        canonical_level=roi.canonical_level,
        canonical_box_size=roi.canonical_box_size * scale,
    )
    head = Conv5(removed["c5"], backbone.out_channels) if conv5 else TwoFC(pooler.in_channels, pooler.resolution, roi.fc_dim)
    settings = RoISettings(**roi.model_dump(include=set(RoISettings.__dataclass_fields__)))
    return RoIHeads(pooler, head, num_classes, settings)


def row_rpn_settings(cfg: Config, short_side: int) -> RPNSettings:
    """Return the numbers of a row's RPN. Trained jointly, it proposes no more than the second stage uses."""
    joint = cfg.task.name == "faster_rcnn" and cfg.task.training == "joint"
    return rpn_settings(cfg.rpn, short_side, cfg.task.roi.proposals if joint else None)


def build_detector(
    cfg: Config, *, num_classes: int = 1, parts: Sequence[str] | None = None, short_side: int | None = None
) -> Detector:
    """Build the detector of a row; its weights are not initialised yet.

    Args:
        num_classes: K of the second stage.
        parts: the heads to build, of "rpn" and "roi"; by default those of the task's network.
        short_side: of the images, in pixels; by default the recipe's.

    Raises:
        UserError: conv5 is the head, and the backbone has only pooling there.
    """
    parts = PARTS[cfg.task.name] if parts is None else parts
    short_side = short_side or cfg.recipe.short_side
    backbone = build_backbone(cfg.backbone)
    if cfg.backbone.frozen_bn:
        freeze_batch_norm(backbone)
    backbone.freeze(cfg.backbone.freeze_at)
    neck = build_neck(cfg.neck, backbone)
    removed = backbone.truncate(neck.deepest)
    rpn = RPN(neck.levels, row_rpn_settings(cfg, short_side)) if "rpn" in parts else None
    roi = build_roi(cfg.task.roi, backbone, removed, neck.levels, num_classes, short_side) if "roi" in parts else None
    if roi and isinstance(roi.box_head, Conv5) and not any(True for _ in roi.box_head.parameters()):
        raise UserError(
            f"backbone={cfg.backbone.label} has only pooling behind C4, so there is no conv5 head: set task.roi.head=2fc"
        )
    # timm's blocks need not list their layers in the order in which they run.
    return optimise(Detector(backbone, neck, rpn, roi), fold=not isinstance(cfg.backbone, TimmBackbone))

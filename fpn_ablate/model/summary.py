"""Summarise a row before it is trained: anchors, reach of the switches, parameters, cost."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fpn_ablate.config.dense import DenseTask
from fpn_ablate.config.schema import Config
from fpn_ablate.config.tasks import RPNTask, SegmentProposalsTask
from fpn_ablate.model.anchors import PAPER_SHORT_SIDE
from fpn_ablate.model.build import HEADS, build_backbone, build_detector, build_neck
from fpn_ablate.model.detectors.dense import DenseDetector
from fpn_ablate.model.detectors.image_pyramid import ImagePyramid
from fpn_ablate.model.detectors.segments import SegmentProposer
from fpn_ablate.model.detectors.two_stage import Detector
from fpn_ablate.model.heads.roi_pooler import RoIPooler

PAPER_SIZE = (800, 1000)  # height and width at which the paper's "# anchors" come out exactly
ROIS = 1000  # an image, as the paper tests
CLASSES = 80  # COCO's
DETECTIONS = 100  # an image, whose masks are computed


@dataclass(frozen=True)
class RowFacts:
    """Summary of a row, with its cost for one image at test time.

    Attributes:
        feature: the maps that the heads read, in the paper's words: {Pk}, P2, C4.
        anchors: of the row's RPN or dense head (boxes, where that has no anchors), or regions of its segment head, whose scales
            play their part; 0 without any.
        reach: the backbone maps that the finest level depends on.
        head: "2fc", "conv5", a class of the user's, the windows of a segment head ("5x5, 7x7"), a dense head ("retinanet"), or
            "" without any.
        proposals: the source of the second stage's proposals ("RPN C4", "file"), or "".
        mask: "fcn", "mlp", or "" without a mask branch.
        image_pyramid: the scales at which an image is read ("0.5, 1, 2"), or "": one. The cost is that of all of them.
        params, trained: parameters that are built, and those that are not frozen; of both networks where RPN and second stage
            share nothing. A second stage and a dense head are counted with the paper's 80 classes.
        gflops: 1e9 floating-point operations, 2 per multiply-add, of convolutions and matrix products (torch's counter). RoI
            pooling, NMS and nearest upsampling are not counted; bilinear upsampling, two products here, is. The second stage
            runs on 1000 RoIs, the mask branch on 100 detections. Of a segment head the scores of all regions are counted, not
            the masks of the best (1 or 2 % more). Where RPN and second stage share nothing, of both networks; where proposals
            are fixed, without the network that made them.
    """

    feature: str
    anchors: int
    lateral: bool
    top_down: bool
    reach: list[str]
    head: str
    proposals: str
    params: int
    trained: int
    gflops: float
    gflops_backbone: float
    gflops_neck: float
    gflops_rpn: float
    gflops_head: float
    gflops_mask: float = 0.0
    mask: str = ""
    image_pyramid: str = ""

    def to_dict(self) -> dict:
        """Return the facts of a record; those of masks and of an image pyramid only with one."""
        absent = [part for part in ("mask", "image_pyramid") if not getattr(self, part)]
        return {key: value for key, value in asdict(self).items() if not key.endswith(tuple(absent))}


def row_facts(cfg: Config, num_classes: int = CLASSES, size: tuple[int, int] = PAPER_SIZE) -> RowFacts:
    """Build a row on the meta device (shapes only) for its cost and its parameters, and its neck for the reach.

    Args:
        num_classes: K of the second stage, or of a dense head.
        size: (height, width) of the image that `anchors` and `gflops` are for.
    """
    networks = [("rpn",), ("roi",)] if cfg.procedure == "separate" else [HEADS[cfg.task.name]]
    with torch.device("meta"):
        models = [
            build_detector(cfg, num_classes=num_classes, heads=heads, short_side=PAPER_SHORT_SIDE).eval() for heads in networks
        ]
        costs, anchors = zip(*(cost_by_part(model, size) for model in models), strict=True)
    gflops = {part: sum(cost[part] for cost in costs) / 1e9 for part in costs[0]}
    parameters = [p for model in models for p in model.parameters()]
    neck = models[0].neck
    return RowFacts(
        feature=neck.label,
        anchors=sum(anchors),
        lateral=neck.has_lateral,
        top_down=neck.has_top_down,
        reach=finest_level_reach(cfg),
        head=next(filter(None, map(_head, models)), ""),
        mask=next((m.roi.mask.head.label for m in models if m.roi and m.roi.mask), ""),
        image_pyramid=", ".join(f"{scale:g}" for scale in cfg.image_pyramid.scales) if cfg.image_pyramid else "",
        proposals=_proposals(cfg, models[0]),
        params=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        gflops=round(sum(gflops.values()), 2),
        **{f"gflops_{part}": round(value, 2) for part, value in gflops.items()},
    )


def cost_by_part(model: Detector, size: tuple[int, int]) -> tuple[dict[str, int], int]:
    """Count the operations of each part of a network on the meta device for one image, and its anchors."""
    cost, anchors = dict.fromkeys(("backbone", "neck", "rpn", "head", "mask"), 0), []
    pyramid = model if isinstance(model, ImagePyramid) else None
    for number, image_size in enumerate(pyramid.scaled_sizes(size) if pyramid else [size]):
        features, flops = _count_flops(model.backbone, torch.empty(1, 3, *image_size))
        cost["backbone"] += flops
        levels, flops = _count_flops(model.neck, features)
        cost["neck"] += flops
        if model.rpn:
            (_, _, of_image), flops = _count_flops(partial(pyramid.read_rpn, number) if pyramid else model.rpn, levels)
            cost["rpn"] += flops
            anchors += of_image
    if model.roi:  # after RoI pooling, which cannot run without values
        rois = ROIS * (pyramid.scales_per_roi if pyramid else 1)
        _, cost["head"] = _count_flops(model.roi.box_head, _pooled(model.roi.pooler, rois * model.roi.pooler.views))
        hidden = torch.empty(ROIS, model.roi.box_head.out_channels)
        cost["head"] += _count_flops(model.roi.predictor, hidden)[1]
        if mask := model.roi.mask:
            shared = [] if mask.pooler else [model.roi.box_head.stage]
            pooled = _pooled(mask.pooler or model.roi.pooler, DETECTIONS)
            _, cost["mask"] = _count_flops(nn.Sequential(*shared, mask.head), pooled)
    if isinstance(model, SegmentProposer):
        scores, cost["head"] = _count_flops(model.segments, levels)
        anchors = list(scores)
    if isinstance(model, DenseDetector):
        (first, *_), cost["head"] = _count_flops(model.head, levels)
        anchors = [x[0] for x in first]
    return cost, sum(map(len, anchors))


def _pooled(pooler: RoIPooler, rois: int) -> torch.Tensor:
    return torch.empty(rois, pooler.in_channels, pooler.resolution, pooler.resolution)


def _count_flops(module: Callable[[Any], Any], x: Any) -> tuple[Any, int]:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out = module(x)
    return out, counter.get_total_flops()


def _head(model: Detector) -> str:
    """Return the name of a network's second stage, segment head or dense head; "" without any."""
    if isinstance(model, DenseDetector):
        return model.head.label
    if isinstance(model, SegmentProposer):
        return model.segments.label
    return model.roi.box_head.label if model.roi else ""


def _proposals(cfg: Config, model: Detector) -> str:
    """Return the source of the second stage's proposals; `model` is the row's."""
    if isinstance(cfg.task, RPNTask | SegmentProposalsTask | DenseTask):
        return ""
    if cfg.task.name != "fast_rcnn":
        return f"RPN {model.neck.label}"
    if cfg.task.proposals.file:
        return "file"
    with torch.device("meta"):
        neck = build_neck(cfg.task.proposals.neck, model.backbone.levels, "task.proposals.neck")
    return f"RPN {neck.label}"


def finest_level_reach(cfg: Config) -> list[str]:
    """Return those of c2..c5 that get a gradient from the neck's finest level."""
    with torch.device("meta"):
        levels = build_backbone(cfg.backbone).levels
        neck = build_neck(cfg.neck, levels)
        features = {
            level.name: torch.empty(2, level.channels, 64 // level.stride, 64 // level.stride, requires_grad=True)
            for level in levels[: [level.name for level in levels].index(neck.deepest) + 1]
        }
        next(iter(neck(features).values())).sum().backward()
    return [name for name, x in features.items() if x.grad is not None]

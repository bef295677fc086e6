"""Declare the configurations of detectors of one stage: dense heads on a neck's levels, without an RPN."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from fpn_ablate.config.base import Extent, Many, NotNegative, PositiveShare, Share, Strict

Convolutions = Annotated[int, Field(strict=True, ge=0, le=64)]
Scales = Annotated[int, Field(strict=True, ge=1, le=16)]
Alpha = Annotated[float, Field(strict=True, gt=0, lt=1)]
Gamma = Annotated[float, Field(strict=True, ge=0, le=100)]


class DenseTask(Strict):
    """A detector of one stage; see `fpn_ablate.model.heads.dense.DenseHead`.

    `pre_nms_topk`: boxes of a level that NMS reads. `proposals`: an image, where it is evaluated as a proposer.
    """

    masks: ClassVar[bool] = False  # the task is trained and evaluated on masks
    level_sizes: ClassVar[str | None] = None  # the key with one size a level of a pyramid; None: no such key
    name: str
    score_thresh: Share
    pre_nms_topk: Many
    nms_thresh: Share
    detections: Many
    proposals: Many
    proposal_nms_thresh: Share


class RetinaNetTask(DenseTask):
    """RetinaNet (Lin et al. 2017); see `fpn_ablate.model.heads.retinanet.RetinaNetHead`."""

    level_sizes: ClassVar[str | None] = "anchor_sizes"
    name: Literal["retinanet"]  # type: ignore[assignment]
    anchor_sizes: Annotated[tuple[Extent, ...], Field(min_length=1, max_length=64)]
    anchor_scales: Scales
    anchor_ratios: Annotated[tuple[Extent, ...], Field(min_length=1, max_length=64)]
    anchor_grid: Literal["exact", "torchvision"]
    convolutions: Convolutions
    norm: Literal["none", "gn"]
    init: Literal["gaussian", "he"]
    prior: Alpha
    positive_iou: PositiveShare
    negative_iou: Share
    unreached: Literal["positive", "negative"]
    loss: Literal["focal", "ce", "balanced_ce", "ohem"]
    alpha: Alpha
    gamma: Gamma
    ohem_samples: Many
    ohem_nms_thresh: Share
    ohem_negatives: NotNegative | None
    box_loss: Literal["l1", "smooth_l1", "giou"]
    box_loss_beta: NotNegative
    box_loss_weight: NotNegative
    normaliser: Literal["image", "batch", "moving"]

    @model_validator(mode="after")
    def _thresholds(self) -> "RetinaNetTask":
        if self.negative_iou > self.positive_iou:
            raise ValueError(f"negative_iou ({self.negative_iou}) must not exceed positive_iou ({self.positive_iou})")
        return self

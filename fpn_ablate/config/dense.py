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

    `pre_nms_topk`: boxes of a level that NMS reads. `proposals`: an image, where it is evaluated as a proposer, which
    `proposal_recall` adds to its evaluation.
    """

    masks: ClassVar[bool] = False  # the task is trained and evaluated on masks
    level_sizes: ClassVar[str | None] = None  # the key with one size a level of a pyramid; None: no such key
    several_widths: ClassVar[bool] = False  # the head has predictors of its own for each level
    name: str
    score_thresh: Share
    pre_nms_topk: Many
    nms_thresh: Share
    detections: Many
    proposals: Many
    proposal_nms_thresh: Share
    proposal_recall: Annotated[bool, Field(strict=True)] = False


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


class FCOSTask(DenseTask):
    """FCOS (Tian et al. 2019); see `fpn_ablate.model.heads.fcos.FCOSHead`.

    `range`: end of a level's range of distances, in strides, on an input of a short side of 800. `center_sampling`: in strides;
    null: all locations inside an object.
    """

    name: Literal["fcos"]  # type: ignore[assignment]
    points: Literal["exact", "center", "torchvision"]
    range: Extent
    center_sampling: Extent | None
    convolutions: Convolutions
    norm: Literal["none", "gn"]
    prior: Alpha
    centerness: Literal["regression", "classification", "none"]
    score: Literal["sqrt", "product"]
    distances: Literal["relu", "exp"]
    level_scale: bool
    alpha: Alpha
    gamma: Gamma
    box_loss: Literal["giou", "iou"]
    box_weights: Literal["none", "centerness"]


class YOLOTask(DenseTask):
    """YOLOv3's head (Redmon and Farhadi 2018); see `fpn_ablate.model.heads.yolo.YOLOHead`."""

    several_widths: ClassVar[bool] = True
    name: Literal["yolo"]  # type: ignore[assignment]
    priors: Annotated[tuple[tuple[Extent, Extent], ...], Field(min_length=1, max_length=256)]
    priors_per_level: Scales
    norm: Literal["none", "gn", "bn"]
    prior: Alpha
    ignore: Literal["priors", "predictions"]
    ignore_iou: Share
    weigh_small: bool
    normaliser: Literal["objects", "images"]


class SSDTask(DenseTask):
    """SSD's head (Liu et al. 2016); see `fpn_ablate.model.heads.ssd.SSDHead`. `negatives`: for each positive."""

    several_widths: ClassVar[bool] = True
    name: Literal["ssd"]  # type: ignore[assignment]
    scales: tuple[PositiveShare, PositiveShare]
    first_scale: PositiveShare | None
    whole_percent: bool
    ratios: Annotated[tuple[Extent, ...], Field(max_length=64)]
    outer_ratios: Annotated[tuple[Extent, ...], Field(max_length=64)]
    clip: bool
    positive_iou: PositiveShare
    loss: Literal["hard_negatives", "focal"]
    negatives: NotNegative
    prior: Alpha
    alpha: Alpha
    gamma: Gamma
    variances: tuple[Extent, Extent, Extent, Extent]
    box_loss_beta: NotNegative

    @model_validator(mode="after")
    def _grow(self) -> "SSDTask":
        if self.scales[0] >= self.scales[1]:
            raise ValueError(f"scales: the first ({self.scales[0]}) must be below the second ({self.scales[1]})")
        return self


AnyDenseTask = RetinaNetTask | FCOSTask | YOLOTask | SSDTask

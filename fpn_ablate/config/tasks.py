"""Declare the configurations of tasks: what is trained, and how proposals are made."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from fpn_ablate.config.base import Cells, Extent, Many, NotNegative, PositiveFloat, Share, Strict, Width
from fpn_ablate.config.dense import AnyDenseTask
from fpn_ablate.config.parts import BuiltInNeck, MaskConfig, RoI, or_user


class RPNTask(Strict):
    """Table 1: the RPN alone, class-agnostic proposals."""

    masks: ClassVar[bool] = False  # the task is trained and evaluated on masks
    name: Literal["rpn"]


class SegmentProposalsTask(Strict):
    """Table 6: class-agnostic segment proposals; see `fpn_ablate.model.heads.segments.SegmentHead`.

    `mask`: R of the R x R bins of a mask. `schedule`: how many times recipe.steps are trained.
    """

    masks: ClassVar[bool] = True
    name: Literal["segment_proposals"]
    mlp: Literal[5, 7, "dual"]
    mask: Cells
    schedule: Literal[1, 2]
    hidden: Width
    scales: Annotated[tuple[Extent, ...], Field(min_length=1, max_length=64)]
    ratio_7x7: PositiveFloat
    padding: NotNegative
    samples: Many
    positive_fraction: Share
    mask_weight: NotNegative
    proposals: Many
    distance: Literal["max", "euclidean"]
    winner: Literal["nearest", "smallest"]
    relu: bool
    init: Literal["gaussian", "xavier"]
    mask_loss: Literal["logistic", "logistic_sum", "dice"]
    mask_average: Literal["positives", "samples"]
    mask_threshold: Share

    @model_validator(mode="after")
    def _scales_differ(self) -> "SegmentProposalsTask":
        sevens = [scale * self.ratio_7x7 for scale in self.scales] if self.mlp == "dual" else []
        scales = [*self.scales, *sevens]
        if len(set(scales)) < len(scales):
            twice = ", ".join(f"{scale:g}" for scale in sorted({s for s in scales if scales.count(s) > 1}))
            raise ValueError(
                f"scales {twice} come twice, and an object has one: change scales, or ratio_7x7 (sqrt 2: half octaves)"
            )
        return self


class ProposalSource(Strict):
    """Whose RPN makes the proposals: one with the neck `neck`, or a `file` that another run has made."""

    neck: or_user(Annotated[BuiltInNeck, Field(discriminator="name")])  # type: ignore[valid-type]
    file: str | None


class FastRCNNTask(Strict):
    """Table 2: Fast R-CNN on fixed proposals, the same for all rows."""

    masks: ClassVar[bool] = False
    name: Literal["fast_rcnn"]
    proposals: ProposalSource
    roi: RoI


class FasterRCNNTask(Strict):
    """Tables 3 and 5: each row's own RPN makes the proposals. `training`: "separate" networks for RPN and Fast R-CNN (not
    shared), "four_step" (shared features, Faster R-CNN's alternating training), or "joint" (end to end, not in the paper).
    `proposal_recall`: the recall of the network's proposals is evaluated too."""

    masks: ClassVar[bool] = False
    name: Literal["faster_rcnn"]
    training: Literal["separate", "four_step", "joint"]
    proposal_recall: Annotated[bool, Field(strict=True)] = False  # configurations of earlier runs lack it
    roi: RoI

    @model_validator(mode="after")
    def _proposes(self) -> "FasterRCNNTask":
        if self.proposal_recall and self.training == "separate":
            raise ValueError(
                "proposal_recall=true is for one network; with training=separate the RPN is another, whose run (task=rpn) has "
                "its recall: use training=joint or four_step"
            )
        return self


class MaskRCNNTask(FasterRCNNTask):
    """Mask R-CNN (He et al. 2017): Faster R-CNN with a mask branch. `mask` null: the box branch alone, for comparison."""

    masks: ClassVar[bool] = True  # also of the box branch alone, so that all rows read the same data
    name: Literal["mask_rcnn"]  # type: ignore[assignment]
    mask: MaskConfig | None


Task = RPNTask | FastRCNNTask | FasterRCNNTask | MaskRCNNTask | SegmentProposalsTask | AnyDenseTask
TASKS = ("rpn", "fast_rcnn", "faster_rcnn", "mask_rcnn", "segment_proposals", "retinanet", "fcos", "yolo", "ssd")
PYRAMID_TASKS = ("rpn", "fast_rcnn", "faster_rcnn")  # those that an image pyramid goes with

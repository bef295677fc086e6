"""Declare the configuration of one run: every key, its type and its limits. Any other key is refused.

Hydra composes `conf/` into a plain dictionary, which `validation.validate` turns into a `Config`. Defaults are in `conf/`
alone, so that each is written once.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from fpn_ablate.config.base import Many, NotNegative, PositiveFloat, PositiveShare, Share, Strict, Width
from fpn_ablate.config.dense import DenseTask
from fpn_ablate.config.parts import (
    AnyNeck,
    Backbone,
    BuiltInNeck,
    HierarchyNeck,
    ImagePyramidConfig,
    MaskConfig,
    PlainBackbone,
    RPNConfig,
    SingleLevelNeck,
    TimmBackbone,
    UserBackbone,
    UserPart,
    or_user,
)
from fpn_ablate.config.tasks import (
    PYRAMID_TASKS,
    FasterRCNNTask,
    FastRCNNTask,
    MaskRCNNTask,
    RPNTask,
    SegmentProposalsTask,
    Task,
)

# More numbers, as in `base`.
Positive = Annotated[int, Field(strict=True, gt=0, le=10**9)]
Count = Annotated[int, Field(strict=True, ge=0, le=10**9)]
Seed = Annotated[int, Field(strict=True, ge=0, le=2**53)]  # integers that every reader of JSON and CSV keeps exactly
Things = Annotated[int, Field(strict=True, ge=0, le=1000)]
Batch = Annotated[int, Field(strict=True, gt=0, le=10**5)]
Workers = Annotated[int, Field(strict=True, ge=0, le=1024)]
GPUs = Annotated[int, Field(strict=True, gt=0, le=1024)]
Jobs = Annotated[int, Field(strict=True, gt=0, le=1024)]
Threads = Annotated[int, Field(strict=True, gt=0, le=1024)]
Grey = Annotated[float, Field(strict=True, ge=0, le=255)]
Side = Annotated[int, Field(strict=True, ge=32, le=8192)]


class Shapes(Strict):
    """The generated set; see `fpn_ablate.data.shapes.World` for what the numbers mean."""

    name: Literal["shapes"]
    seed: Seed
    train_images: Many
    val_images: Many
    aspect: Annotated[float, Field(strict=True, ge=0.25, le=4)]
    objects: tuple[Things, Things]
    distractors: tuple[Things, Things]
    mix: tuple[Share, Share, Share]
    distractor_mix: tuple[Share, Share, Share]
    extent: tuple[PositiveShare, PositiveShare]
    single_scale: PositiveShare | None
    lanterns: Annotated[float, Field(strict=True, ge=0.1, le=1)]
    patches: Grey
    noise: Grey
    context: bool

    @model_validator(mode="after")
    def _ordered(self) -> "Shapes":
        for key in ("objects", "distractors", "extent"):
            low, high = getattr(self, key)
            if low > high:
                raise ValueError(f"{key}: the first number ({low}) must not exceed the second ({high})")
        for key in ("mix", "distractor_mix"):
            if sum(getattr(self, key)) <= 0:
                raise ValueError(f"{key}: at least one share must be above 0")
        return self


class Split(Strict):
    annotations: str
    images: str


class Coco(Strict):
    """Any data set in COCO's instances format."""

    name: Literal["coco"]
    label: str | None
    root: str
    train: Split
    val: Split
    invalid: Literal["error", "clip", "drop"]
    keep_empty: bool
    links: bool = False  # configurations of earlier runs lack it

    @field_validator("root")
    @classmethod
    def _given(cls, root: str) -> str:
        if root == "???":
            raise ValueError("missing: give data.root=FOLDER, in which annotations/ and images/ lie")
        return root


class Optimizer(Strict):
    """`lr` is that of a batch of `lr_batch_size` images (null: of any): see `fpn_ablate.engine.optim.base_learning_rate`.
    `backbone_lr_factor`: the factor on it for the backbone, and for conv5 where that is the box head."""

    name: Literal["sgd", "adamw"]
    lr: PositiveFloat
    lr_batch_size: Positive | None
    backbone_lr_factor: PositiveFloat = 1.0  # configurations of earlier runs lack it
    momentum: Share
    weight_decay: NotNegative


class Schedule(Strict):
    """Learning rate over the steps: linear warm-up, then "step" (x 0.1 at each of `drops`, shares of all steps) or "cosine"."""

    name: Literal["step", "cosine"]
    warmup_steps: Count
    drops: Annotated[tuple[Share, ...], Field(max_length=1000)]


class Pretrain(Strict):
    """Classification of single things, for a backbone without ImageNet weights. Counted as part of the cost."""

    side: Side
    steps: Positive
    batch_size: Batch
    lr: PositiveFloat
    seed: Seed


class RoIRecipe(Strict):
    """The second stage's numbers in a recipe. `proposals`: the number of best ones that are used, in (training, test)."""

    steps: Positive
    samples: Many
    proposals: tuple[Many, Many]
    fc_dim: Width
    pooling: Literal["align", "align_v2", "pool"]
    loss_beta: NotNegative


class DenseRecipe(Strict):
    """The numbers of RetinaNet in a recipe; see `fpn_ablate.config.dense.RetinaNetTask`."""

    init: Literal["gaussian", "he"]


class Recipe(Strict):
    """`batch_size`: images of one update; `accumulate`: in how many parts, one after the other, they are worked on.
    `fast`: put in the faster modules of `fpn_ablate.model.optimise`, which compute the same."""

    name: str
    short_side: Side
    max_side: Side
    antialias: bool
    channels: Annotated[int, Field(strict=True, ge=1, le=4096)]
    batch_size: Batch
    accumulate: Batch
    steps: Positive
    optimizer: Optimizer
    schedule: Schedule
    clip_norm: PositiveFloat | None
    flip: bool
    group_by_aspect: bool
    bf16: bool
    fast: bool
    eval_batch_size: Batch
    eval_images: Positive | None
    checkpoint_every: Positive
    pretrain: Pretrain
    roi: RoIRecipe
    dense: DenseRecipe = DenseRecipe(init="gaussian")  # configurations of earlier runs lack it

    @model_validator(mode="after")
    def _sides(self) -> "Recipe":
        if self.max_side < self.short_side:
            raise ValueError(f"max_side ({self.max_side}) must not be below short_side ({self.short_side})")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate ({self.accumulate}) must divide batch_size ({self.batch_size})")
        return self


class Log(Strict):
    wandb: Literal["disabled", "offline", "online"]
    project: str
    every: Positive
    tensorboard: bool = False  # configurations of earlier versions lack it


class Config(Strict):
    """One cell: a row of a table at one seed."""

    mode: Literal["train", "evaluate"]
    weights: str | None
    table: str
    row: str
    seed: Seed
    factors: Annotated[tuple[str, ...], Field(min_length=1, max_length=1000)]
    out: str
    device: Literal["auto", "cpu", "cuda"]
    threads: Threads | None
    workers: Workers
    deterministic: bool | Literal["auto"]
    gpus: GPUs = 1  # configurations of earlier runs lack it
    jobs: Jobs | Literal["auto"] = "auto"  # configurations of earlier runs lack it
    on_failure: Literal["continue", "stop"]
    objective: str | None = None  # configurations of earlier runs lack it
    data: Shapes | Coco = Field(discriminator="name")
    backbone: or_user(Annotated[Backbone | PlainBackbone | TimmBackbone, Field(discriminator="name")], UserBackbone)  # type: ignore[valid-type]
    neck: or_user(Annotated[BuiltInNeck, Field(discriminator="name")])  # type: ignore[valid-type]
    rpn: RPNConfig
    image_pyramid: ImagePyramidConfig | None = None  # configurations of earlier runs lack it
    task: Task = Field(discriminator="name")
    recipe: Recipe
    log: Log

    @property
    def data_name(self) -> str:
        """Return the data set's name in tables: `shapes`, or the label or folder of a COCO-format set."""
        data = self.data
        return (data.label or Path(data.root).expanduser().resolve().name) if isinstance(data, Coco) else data.name

    @property
    def steps(self) -> int:
        """Training steps of the cell itself, without those of cells that it builds on."""
        if self.mode == "evaluate" or self.trained_without_pyramid:
            return 0
        if isinstance(self.task, RPNTask | DenseTask):
            return self.recipe.steps
        if isinstance(self.task, SegmentProposalsTask):
            return self.recipe.steps * self.task.schedule
        return self.recipe.roi.steps + (self.recipe.steps if self.procedure == "four_step" else 0)

    @property
    def procedure(self) -> str:
        """Return the name of the procedure that trains the cell (`fpn_ablate.engine.procedures`)."""
        if isinstance(self.task, DenseTask):
            return "dense"
        return self.task.training if isinstance(self.task, FasterRCNNTask) else self.task.name

    @property
    def trained_without_pyramid(self) -> bool:
        """Return True if the cell is the trained detector of the same row without the image pyramid, tested with it."""
        return self.mode == "train" and self.image_pyramid is not None and self.image_pyramid.train == "one"

    @property
    def proposal_recall(self) -> bool:
        """Return whether the recall of proposals is evaluated beside the detections."""
        return getattr(self.task, "proposal_recall", False)

    @property
    def mask(self) -> MaskConfig | None:
        """Return the configuration of the mask branch; None without one."""
        return self.task.mask if isinstance(self.task, MaskRCNNTask) else None

    @property
    def parts(self) -> dict[str, Any]:
        """Return the parts that the cell uses, those of its proposals included, by their dotted keys."""
        parts: dict[str, Any] = {"backbone": self.backbone, "neck": self.neck}
        parts |= {"image_pyramid": "image_pyramid"} if self.image_pyramid else {}
        if isinstance(self.task, SegmentProposalsTask):
            return parts
        if isinstance(self.task, DenseTask):
            return parts | {"task": self.task}
        fixed = isinstance(self.task, FastRCNNTask)
        if not (fixed and self.task.proposals.file):
            parts |= {"rpn.head": self.rpn.head} | ({"task.proposals.neck": self.task.proposals.neck} if fixed else {})
        parts |= {} if isinstance(self.task, RPNTask) else {"task.roi.head": self.task.roi.head}
        return parts | ({"task.mask.head": self.mask.head} if self.mask else {})

    @property
    def level_sizes(self) -> tuple[str, tuple[float, ...]] | None:
        """Return the key that has one size a level of a pyramid, and its sizes; None: the row's head needs none."""
        if isinstance(self.task, SegmentProposalsTask):
            return "task.scales", self.task.scales
        if isinstance(self.task, DenseTask):
            key = self.task.level_sizes
            return (f"task.{key}", getattr(self.task, key)) if key else None
        return "rpn.anchor_sizes", self.rpn.anchor_sizes

    @property
    def user_parts(self) -> dict[str, UserPart]:
        """Return those of `parts` whose class is the user's."""
        return {key: part for key, part in self.parts.items() if isinstance(part, UserPart)}

    @model_validator(mode="after")
    def _shares_parts(self) -> "Config":
        parts = self.recipe.accumulate
        if self.mode == "train" and parts % self.gpus:
            raise ValueError(
                f"gpus={self.gpus} cannot share the recipe.accumulate={parts} parts of an update evenly: set recipe.accumulate "
                f"to a multiple, as {self.gpus}, for all rows of a table (it decides the last bits, gpus does not)"
            )
        return self

    @model_validator(mode="after")
    def _starts(self) -> "Config":
        stride, weights = getattr(self.backbone, "stride_in_1x1", False), self.backbone.weights
        if self.mode == "train" and stride and weights in ("imagenet", "pretrain"):
            raise ValueError(
                f"backbone.weights={weights} are made with the stride in the 3x3: give a file made with it in the 1x1, none, "
                "or set backbone.stride_in_1x1=false"
            )
        factor = self.recipe.optimizer.backbone_lr_factor
        if self.mode == "train" and weights == "none" and factor != 1:
            raise ValueError(
                f"recipe.optimizer.backbone_lr_factor={factor} is for pre-trained backbones; with weights=none set it to 1"
            )
        return self

    @model_validator(mode="after")
    def _evaluates(self) -> "Config":
        if self.mode == "train" and self.weights is not None:
            raise ValueError("weights belongs to mode=evaluate; a backbone to start training from is backbone.weights=FILE")
        if self.mode == "evaluate" and self.weights is None:
            raise ValueError("mode=evaluate needs weights=FILE, or the folder of a run")
        if self.mode == "evaluate" and self.seed:
            raise ValueError(f"seed={self.seed}: mode=evaluate draws nothing, and one detector is one result: set seed=0")
        if self.mode == "evaluate" and self.task.name == "fast_rcnn" and not self.task.proposals.file:
            raise ValueError(
                "mode=evaluate trains no RPN: give task=fast_rcnn its task.proposals.file=FILE, or use task=faster_rcnn"
            )
        return self

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if isinstance(self.data, Shapes) and self.recipe.max_side < self.recipe.short_side * max(
            self.data.aspect, 1 / self.data.aspect
        ):
            raise ValueError("recipe.max_side cuts the generated pictures: raise it, or bring data.aspect closer to 1")
        self._fits_anchors(self.neck)
        if isinstance(self.task, FastRCNNTask):
            self._fits_anchors(self.task.proposals.neck)
        roi = getattr(self.task, "roi", None)
        joint = isinstance(self.task, FasterRCNNTask) and self.task.training == "joint"  # reads as many as it uses
        for used, made in [] if roi is None or joint else zip(roi.proposals, self.rpn.post_nms_topk, strict=True):
            if used > made:
                raise ValueError(f"task.roi.proposals asks for {used} an image, and rpn.post_nms_topk leaves {made}: raise it")
        if roi and roi.head == "conv5" and not (isinstance(self.neck, SingleLevelNeck) and self.neck.level == "c4"):
            raise ValueError("task.roi.head=conv5 continues the backbone behind C4: it goes with ablation=c4 alone")
        return self

    @model_validator(mode="after")
    def _has_batch_statistics(self) -> "Config":
        alone = self.mode == "train" and self.recipe.batch_size == self.recipe.accumulate
        if alone and not isinstance(self.neck, UserPart) and getattr(self.neck, "norm", None) == "bn":
            stride = 2 ** int(self.neck.level_names[-1][1:])
            if self.recipe.short_side <= stride:
                raise ValueError(
                    f"neck.norm=bn has no statistics of one image a part and a map of one cell (stride {stride}): "
                    f"set neck.norm=gn, recipe.short_side above {stride}, or recipe.batch_size above recipe.accumulate"
                )
        return self

    @model_validator(mode="after")
    def _reads_image_pyramid(self) -> "Config":
        if self.image_pyramid and self.task.name not in PYRAMID_TASKS:
            raise ValueError(
                f"image_pyramid goes with {', '.join(f'task={task}' for task in PYRAMID_TASKS)}, "
                f"and not with task={self.task.name}: set image_pyramid=none, or another task"
            )
        return self

    @property
    def one_width(self) -> bool:
        """Return whether the row's neck has levels of one width, since a head is shared by them."""
        if isinstance(self.task, DenseTask):
            return not self.task.several_widths
        return self.rpn.shared or not isinstance(self.task, RPNTask)

    @model_validator(mode="after")
    def _fits_widths(self) -> "Config":
        necks = [(self.neck, self.one_width)]
        if isinstance(self.task, FastRCNNTask) and not self.task.proposals.file:
            necks.append((self.task.proposals.neck, self.rpn.shared))
        for number, (neck, one_width) in enumerate(necks):
            if one_width and isinstance(neck, HierarchyNeck) and len(neck.level_names) > 1:
                of_rpn = number or isinstance(self.task, RPNTask)
                fix = "set rpn.shared=false" if of_rpn else "use task=ssd or yolo, task=rpn with rpn.shared=false, or neck=fpn"
                user = "the RPN" if of_rpn else f"task={self.task.name}"
                raise ValueError(f"the levels of neck=hierarchy differ in width, and {user} has one head for all: {fix}")
        return self

    def _fits_anchors(self, neck: AnyNeck) -> None:
        names = () if isinstance(neck, SingleLevelNeck | UserPart) else neck.level_names
        if len(names) > 1 and self.level_sizes:
            key, sizes = self.level_sizes
            if len(sizes) < len(names):
                # A level without anchors would be computed for nothing.
                levels = f"{len(names)} levels {', '.join(names)}"
                raise ValueError(f"{key} has {len(sizes)} sizes for the {levels}: give one a level")


# Keys that say where and how a run is carried out, not what comes out. They are no part of its identity; the device that a run
# has in the end, whether it is deterministic there, and a CPU's threads are (runs.identity.fingerprint_inputs).
INCIDENTAL = (
    *("table", "row", "factors", "out", "device", "deterministic", "threads", "workers", "gpus", "jobs", "on_failure"),
    *("objective", "log"),
)

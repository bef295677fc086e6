"""Declare the configurations of parts: backbones, necks, RPN, second stage, and classes of the user's."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, PrivateAttr, Tag, field_validator, model_validator

from fpn_ablate.config.base import Cells, Extent, Many, NotNegative, PositiveShare, Scale, Share, Strict, Width
from fpn_ablate.config.necks import BiFPNNeck, NASFPNNeck, Norm, StackedNeck, YOLONeck


class UserPart(BaseModel):
    """A part whose class is the user's: `class: necks.PathAggregation` is a class in necks.py below `--config-dir`.

    All other keys are arguments of the class, which `config.user_parts` checks. The folder comes from the command line alone:
    no value of a file or of a record can set it.
    """

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False, serialize_by_alias=True)

    class_: Annotated[str, Field(alias="class", pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$")]
    _folder: Path | None = PrivateAttr(None)
    # The class and {module: (file, text)} of its code, to which a run keeps.
    _loaded: tuple[type, dict[str, tuple[Path, str]]] | None = PrivateAttr(None)

    def model_post_init(self, context: Any) -> None:
        self._folder = (context or {}).get("config_dir")

    def __getstate__(self) -> dict[Any, Any]:
        """Leave out the class, whose module another process has not imported: it loads the class from the same folder."""
        state = super().__getstate__()
        return state | {"__pydantic_private__": {**state["__pydantic_private__"], "_loaded": None}}

    @property
    def folder(self) -> Path | None:
        """Return the folder that `--config-dir` named; None without one."""
        return self._folder

    @property
    def label(self) -> str:
        """Return the class as the configuration names it."""
        return self.class_

    @property
    def row(self) -> str:
        """Return the name of a source run's row with this neck: its class's, since a record has no other."""
        return self.class_.rpartition(".")[2]

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the keys that are arguments of the class."""
        return dict(self.model_extra or {})


def _whose(value: Any) -> str:
    return "user" if isinstance(value, UserPart) or (isinstance(value, dict) and "class" in value) else "built-in"


def or_user(built_in: Any, user: type[UserPart] = UserPart) -> Any:
    """Return the type of a part: one of ours, or with a key `class` one of the user's."""
    return Annotated[Annotated[built_in, Tag("built-in")] | Annotated[user, Tag("user")], Discriminator(_whose)]


class _BackboneKeys(BaseModel):
    """`weights`: "none", "shipped" (with the package), "pretrain" (classification of the generated world, made once and kept),
    "imagenet" (downloaded), or a file of weights. `freeze_at`: how many of stem, conv2, ... conv5 are not trained."""

    weights: str
    freeze_at: Annotated[int, Field(strict=True, ge=0, le=5)]
    frozen_bn: bool

    @model_validator(mode="after")
    def _trainable(self) -> "_BackboneKeys":
        if self.weights == "none" and (self.freeze_at or self.frozen_bn):
            raise ValueError(
                "weights=none starts from random weights, which must not stay frozen: "
                "set backbone.freeze_at=0 backbone.frozen_bn=false"
            )
        if self.weights == "shipped" and getattr(self, "name", None) != "small":
            raise ValueError("only the weights of backbone=small come with the package: use weights=pretrain, none or a FILE")
        return self


class Backbone(Strict, _BackboneKeys):
    """`stride_in_1x1`: where a bottleneck halves the resolution (`fpn_ablate.model.backbones.torchvision.stride_to_1x1`)."""

    name: Literal[
        "small",
        "small_deep",
        "resnet18",
        "resnet34",
        "resnet50",
        "resnet101",
        "resnet152",
        "resnext50_32x4d",
        "mobilenet_v2",
        "mobilenet_v3_large",
    ]
    stride_in_1x1: Annotated[bool, Field(strict=True)]

    @property
    def label(self) -> str:
        """Return the name that `backbone=` takes."""
        return self.name

    @model_validator(mode="after")
    def _has_weights(self) -> "Backbone":
        if self.weights == "imagenet" and self.name in ("small", "small_deep"):
            raise ValueError(f"the {self.name} backbone has no ImageNet weights: use weights=pretrain, or one of torchvision's")
        return self

    @model_validator(mode="after")
    def _bottlenecks(self) -> "Backbone":
        if self.stride_in_1x1 and self.name not in ("resnet50", "resnet101", "resnet152", "resnext50_32x4d"):
            raise ValueError(f"stride_in_1x1=true needs bottlenecks, which {self.name} lacks: use resnet50 or deeper, or false")
        return self


class PlainBackbone(Strict, _BackboneKeys):
    """Bodies without residual bottlenecks of torchvision's kind. `width` scales every layer, for small machines; `map_norm`
    normalises maps on their way to the neck: VGG's two finest (L2, as SSD), all of ConvNeXt's (layer norm)."""

    name: Literal["vgg16", "convnext_tiny", "darknet53", "walkthrough"]
    width: PositiveShare
    map_norm: bool

    @property
    def label(self) -> str:
        """Return the name that `backbone=` takes."""
        return self.name

    @model_validator(mode="after")
    def _fits(self) -> "PlainBackbone":
        if self.weights == "imagenet" and self.name in ("darknet53", "walkthrough"):
            raise ValueError(
                f"torchvision has no ImageNet weights of {self.name}: use weights=pretrain, none, or a FILE of ours"
            )
        if self.width != 1 and (self.name == "convnext_tiny" or self.weights == "imagenet"):
            raise ValueError(f"{self.name} with weights={self.weights} has one width: set backbone.width=1")
        if self.map_norm and self.name in ("darknet53", "walkthrough"):
            raise ValueError(f"map_norm is for vgg16 and convnext_tiny; with {self.name} set it to false")
        return self


class TimmBackbone(Strict, _BackboneKeys):
    """Any network of timm that has maps of strides 4, 8, 16 and 32: backbone=timm/MODEL. "imagenet" stands for the weights that
    timm has for `model`, and a file's names are timm's."""

    name: Literal["timm"]
    model: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]

    @property
    def label(self) -> str:
        """Return the name that `backbone=` takes."""
        return f"timm/{self.model}"

    @field_validator("model", mode="before")
    @classmethod
    def _given(cls, value: Any) -> Any:
        if value == "???":
            raise ValueError("say which: backbone=timm/MODEL, as timm/resnext50_32x4d")
        return value


class UserBackbone(UserPart, _BackboneKeys):
    """A user's backbone: its further keys are arguments of the class."""

    @model_validator(mode="after")
    def _has_weights(self) -> "UserBackbone":
        if self.weights == "imagenet":
            raise ValueError(f"{self.class_} has no ImageNet weights: use weights=pretrain, none, or a FILE")
        return self


AnyBackbone = Backbone | PlainBackbone | TimmBackbone | UserBackbone


class FPNNeck(Strict):
    """The switches of the pyramid; see `fpn_ablate.model.necks.fpn.FPN`."""

    name: Literal["fpn"]
    channels: Annotated[int, Field(strict=True, ge=1, le=4096)]
    top_down: bool
    lateral: bool
    output: Literal["pyramid", "p2", "p3", "p4", "p5"]
    upsample: Literal["nearest", "bilinear", "deconv", "carafe"]
    upsample_init: Literal["bilinear", "random"] = "bilinear"  # earlier runs lack it; it is read before training alone
    fuse: Literal["sum", "mean", "weighted"] = "sum"  # configurations of earlier runs lack it
    norm: Norm = "none"  # as `fuse`
    smooth: Literal["all", "merged", "none"]
    p6: Literal["subsample", "conv", "conv_c5", "none"]
    levels: Literal["p2-p6", "p3-p7"] = "p2-p6"  # configurations of earlier runs lack it

    @model_validator(mode="after")
    def _connected(self) -> "FPNNeck":
        if not self.top_down and not self.lateral:
            raise ValueError(
                "top_down=false with lateral=false connects P2..P4 to nothing: switch at most one of them off "
                "(a single backbone map is ablation=c4 or ablation=c5)"
            )
        return self

    @model_validator(mode="after")
    def _learns_to_upsample(self) -> "FPNNeck":
        if self.upsample_init == "random" and self.upsample != "deconv":
            raise ValueError(f"upsample_init=random needs upsample=deconv: {self.upsample} has no weights to start from")
        return self

    @model_validator(mode="after")
    def _fuses(self) -> "FPNNeck":
        if self.fuse != "sum" and not (self.top_down and self.lateral):
            raise ValueError(f"fuse={self.fuse} needs top_down=true and lateral=true: there is nothing else to fuse")
        return self

    @model_validator(mode="after")
    def _puts_out(self) -> "FPNNeck":
        if self.levels == "p3-p7" and self.output == "p2":
            raise ValueError("output=p2 is none of levels=p3-p7: set levels=p2-p6")
        return self

    @property
    def level_names(self) -> tuple[str, ...]:
        """Return the names of the levels that the neck puts out, finest first."""
        if self.output != "pyramid":
            return (self.output,)
        finest, coarsest = self.levels.split("-")
        names = ("p2", "p3", "p4", "p5", "p6", "p7")
        end = "p5" if self.p6 == "none" else coarsest
        return names[names.index(finest) : names.index(end) + 1]

    @property
    def row(self) -> str:
        """Return the name of the row that differs from the default by this neck alone."""
        name = "bottom_up" if not self.top_down else "fpn" if self.lateral else "no_lateral"
        name += "" if self.levels == "p2-p6" else f"+levels={self.levels}"
        return name if self.output == "pyramid" else f"{name}+output={self.output}"


class SingleLevelNeck(Strict):
    """One backbone map; see `fpn_ablate.model.necks.single_level.SingleLevel`."""

    name: Literal["single_level"]
    level: Literal["c2", "c3", "c4", "c5"]

    @property
    def row(self) -> str:
        """Return the name of the row that differs from the default by this neck alone."""
        return self.level


class PAFPNNeck(FPNNeck):
    """Path aggregation on top of the pyramid; see `fpn_ablate.model.necks.pafpn.PAFPN`."""

    name: Literal["pafpn"]  # type: ignore[assignment]
    output: Literal["pyramid"]  # type: ignore[assignment]
    act: Literal["none", "relu"]
    chain: Literal["output", "sum"]

    @property
    def row(self) -> str:
        """Return the name of the row that differs from the default by this neck alone."""
        return self.name


class HierarchyNeck(Strict):
    """The backbone's maps as they are; see `fpn_ablate.model.necks.hierarchy.Hierarchy`."""

    name: Literal["hierarchy"]
    start: Literal["c2", "c3", "c4", "c5"]
    extras: Annotated[int, Field(strict=True, ge=0, le=4)]
    extra_channels: Annotated[int, Field(strict=True, ge=2, le=4096)]
    l2_norm: bool

    @property
    def row(self) -> str:
        """Return the name of the row that differs from the default by this neck alone."""
        return f"hierarchy+start={self.start}+extras={self.extras}" + "+l2_norm=true" * self.l2_norm

    @property
    def level_names(self) -> tuple[str, ...]:
        """Return the names of the levels that the neck puts out, finest first."""
        return tuple(f"c{k}" for k in range(int(self.start[1:]), 6 + self.extras))


BuiltInNeck = FPNNeck | SingleLevelNeck | HierarchyNeck | PAFPNNeck | BiFPNNeck | NASFPNNeck | YOLONeck | StackedNeck
AnyNeck = BuiltInNeck | UserPart


class RPNConfig(Strict):
    """The RPN; see `fpn_ablate.model.heads.rpn.RPN`. Pairs are (training, test)."""

    name: Literal["rpn"]
    head: or_user(Literal["conv"])  # type: ignore[valid-type]
    relu: Annotated[bool, Field(strict=True)] = True  # configurations of earlier runs lack it, and the next two
    scores: Literal[1, 2] = 1
    shared: Annotated[bool, Field(strict=True)] = True
    anchor_sizes: Annotated[tuple[Extent, ...], Field(min_length=1, max_length=64)]
    anchor_ratios: Annotated[tuple[Extent, ...], Field(min_length=1, max_length=64)]
    anchor_grid: Literal["exact", "torchvision"]
    positive_iou: Share
    negative_iou: Share
    samples: Many
    positive_fraction: Share
    pre_nms_topk: tuple[Many, Many]
    pre_nms_topk_single: tuple[Many, Many]
    post_nms_topk: tuple[Many, Many]
    nms_thresh: Share
    box_loss_beta: NotNegative

    @model_validator(mode="after")
    def _thresholds(self) -> "RPNConfig":
        if self.negative_iou > self.positive_iou:
            raise ValueError(f"negative_iou ({self.negative_iou}) must not exceed positive_iou ({self.positive_iou})")
        if isinstance(self.head, UserPart) and (self.scores == 2 or not self.relu):
            raise ValueError(f"relu and scores are of the head conv: with {self.head.class_} leave relu=true and scores=1")
        return self


class RoI(Strict):
    """The second stage; see `fpn_ablate.model.heads.roi.RoIHeads`. Pairs are (training, test)."""

    head: or_user(Literal["auto", "2fc", "conv5"])  # type: ignore[valid-type]
    levels: Literal["assigned", "all"] = "assigned"  # configurations of earlier runs lack it
    canonical_level: Cells
    canonical_box_size: Extent
    pooling: Literal["align", "align_v2", "pool"]
    sampling_ratio: Annotated[int, Field(strict=True, ge=0, le=64)]
    resolution: Cells
    conv5_resolution: Cells
    fc_dim: Width
    proposals: tuple[Many, Many]
    samples: Many
    positive_fraction: Share
    positive_iou: PositiveShare
    box_weights: tuple[Extent, Extent, Extent, Extent]
    box_loss_beta: NotNegative
    score_thresh: Share
    nms_thresh: Share
    detections: Many

    @model_validator(mode="after")
    def _merges_levels(self) -> "RoI":
        if self.levels == "all" and self.head not in ("auto", "2fc"):
            raise ValueError("levels=all needs the head 2fc, which merges what it pools from several levels")
        return self


class MaskConfig(Strict):
    """The mask branch; see `fpn_ablate.model.heads.mask.MaskBranch`."""

    head: Literal["fcn", "mlp"]
    resolution: Cells
    convolutions: Annotated[int, Field(strict=True, ge=0, le=64)]
    channels: Width
    fc_dim: Width
    class_agnostic: Annotated[bool, Field(strict=True)]
    targets: Literal["exact", "torchvision"]


class ImagePyramidConfig(Strict):
    """A detector that reads each image at several scales; see `fpn_ablate.model.detectors.image_pyramid.ImagePyramid`.

    `scales`: sides, as factors on those of the input. `train`: "one" (the detector is trained on the input as it is, and reads
    the other scales at test time alone) or "random" (each batch is trained at a scale that is drawn for it).
    """

    scales: Annotated[tuple[Scale, ...], Field(min_length=1, max_length=16)]
    box_size: Extent
    roi: Literal["nearest", "adjacent_max"]
    train: Literal["one", "random"]

    @field_validator("scales")
    @classmethod
    def _differ(cls, scales: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(scales)) < len(scales):
            raise ValueError("a scale comes twice, and would be computed twice: give each once")
        return scales

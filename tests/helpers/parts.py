"""Configurations of single parts: the defaults of conf/ with the keys that a test changes."""

from functools import cache
from typing import Any

from fpn_ablate.config.composition import compose
from fpn_ablate.config.dense import DenseTask
from fpn_ablate.config.parts import AnyBackbone, FPNNeck, HierarchyNeck, RoI, RPNConfig, SingleLevelNeck
from fpn_ablate.config.schema import Config
from fpn_ablate.config.tasks import SegmentProposalsTask


@cache
def _composed(*overrides: str) -> Config:
    return compose(overrides)


def _changed(config: Any, keys: dict[str, Any]) -> Any:
    return type(config).model_validate(config.model_dump() | keys)


def rpn_config(**keys: Any) -> RPNConfig:
    return _changed(_composed().rpn, keys)


def roi_config(**keys: Any) -> RoI:
    return _changed(_composed("task=fast_rcnn", "recipe=paper2017").task.roi, {"pooling": "align"} | keys)


def segments_config(**keys: Any) -> SegmentProposalsTask:
    return _changed(_composed("task=segment_proposals").task, keys)


def fpn_config(**keys: Any) -> FPNNeck:
    return _changed(_composed().neck, keys)


def single_level_config(level: str) -> SingleLevelNeck:
    return SingleLevelNeck(name="single_level", level=level)


def hierarchy_config(**keys: Any) -> HierarchyNeck:
    return _changed(_composed("neck=hierarchy", "rpn.shared=false").neck, keys)


def backbone_config(name: str, **keys: Any) -> AnyBackbone:
    """Return the configuration of `backbone=name`."""
    return _changed(_composed(f"backbone={name}").backbone, keys)


def dense_config(name: str, **keys: Any) -> DenseTask:
    """Return the configuration of `task=name`, a dense head."""
    return _changed(_composed(f"task={name}").task, keys)

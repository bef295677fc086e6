"""Check that a part keeps its promises: levels, strides, sizes of maps, channels, and a gradient for every parameter.

Everything is checked on the meta device, which knows shapes alone. Built-in parts have tests instead.

Shape letters: N images of H x W pixels, C channels, Ri anchors of level i, M RoIs, S x S bins.
"""

import inspect
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fpn_ablate.config.user_parts import meta_hint
from fpn_ablate.model.backbones.base import STAGES, Backbone
from fpn_ablate.model.heads.box_head import BoxHead
from fpn_ablate.model.necks.base import Neck
from fpn_ablate.structures.levels import Features, Level
from fpn_ablate.utils.errors import UserError, first_line, raising_line
from fpn_ablate.utils.paths import PACKAGE

# Height and width of images: multiples of 32, as batches are padded to. The coarsest maps have odd sides.
PROBES = ((96, 160), (64, 224))


def check_backbone(backbone: Any, where: str) -> None:
    """Check the maps C2..C5 of a backbone.

    Args:
        where: the part's key and value, for messages.

    Raises:
        UserError: it says what is wrong.
    """
    _check_type(backbone, Backbone, where)
    for size in PROBES:
        maps = _check_maps(backbone, torch.empty(2, 3, *size), backbone.levels, size, where, "an image")
    _check_gradients(backbone, maps.values(), where)
    for stages in (4, 3, 2):  # without the stages that a neck does not read
        backbone.truncate(STAGES[stages - 1])
        image = f"an image, cut behind {STAGES[stages - 1]},"
        _check_maps(backbone, torch.empty(2, 3, *PROBES[0]), backbone.levels[: stages - 1], PROBES[0], where, image)


def check_neck(
    neck: Any, in_levels: Sequence[Level], where: str, anchor_sizes: int | None = None, one_width: bool = True
) -> None:
    """Check the levels of a neck on a backbone's levels.

    Args:
        anchor_sizes: how many sizes of anchors the RPN has, or the task's head; None without anchors.
        one_width: the levels share a head.

    Raises:
        UserError: as `check_backbone`.
    """
    _check_type(neck, Neck, where)
    names = [level.name for level in in_levels]
    if neck.deepest not in names:
        raise UserError(f"{where}: deepest is {neck.deepest!r}; name the last map that it reads, one of {', '.join(names)}")
    levels = getattr(neck, "levels", ())
    if not levels or not all(isinstance(level, Level) for level in levels):
        raise UserError(f"{where}: levels is {levels!r}; set it to a tuple of Level(name, channels), finest first")
    strides, widths = [level.stride for level in levels], {level.channels for level in levels}
    if any(coarse != 2 * fine for fine, coarse in pairwise(strides)) or (one_width and len(widths) > 1):
        found = ", ".join(f"{level.name} ({level.channels} channels)" for level in levels)
        width = ", and all one width (an RPN alone can do with several: rpn.shared=false)" if one_width else ""
        raise UserError(f"{where}: levels are {found}; each must have twice the stride of the one before{width}")
    if anchor_sizes is not None and len(levels) > max(anchor_sizes, 1):
        keys = "rpn.anchor_sizes (task.anchor_sizes of RetinaNet, task.scales of segments)"
        raise UserError(f"{where}: it has {len(levels)} levels and {keys} {anchor_sizes} sizes: give one a level")
    read = in_levels[: names.index(neck.deepest) + 1]
    for size in PROBES:
        features = {level.name: torch.empty(2, level.channels, *_cells(level, size)) for level in read}
        maps = _check_maps(neck, features, levels, size, where, "the maps of an image")
    _check_gradients(neck, maps.values(), where)


def check_rpn_head(head: Any, levels: Sequence[Level], num_anchors: int, where: str) -> None:
    """Check the objectness (N, Ri) and deltas (N, Ri, 4) of an RPN's head on the levels that it reads.

    Raises:
        UserError: as `check_backbone`.
    """
    _check_type(head, nn.Module, where)
    maps = {level.name: torch.empty(2, level.channels, *_cells(level, PROBES[0])) for level in levels}
    output = _call(head, maps, where, "a neck's maps")
    anchors = [x.shape[2] * x.shape[3] * num_anchors for x in maps.values()]
    expected = [[(2, r) for r in anchors], [(2, r, 4) for r in anchors]]
    lists = isinstance(output, tuple) and all(isinstance(part, list) for part in output)
    shapes = [[_shape(x) for x in part] for part in output] if lists else type(output).__name__
    if shapes != expected:
        raise UserError(
            f"{where}: returns {shapes} for levels of {', '.join(map(str, anchors))} anchors in 2 images; "
            f"the lists (objectness, deltas) must have the shapes {expected}"
        )
    _check_gradients(head, [x for part in output for x in part], where)


def check_box_head(head: Any, in_channels: int, resolution: int, where: str) -> None:
    """Check that a box head maps pooled features (M, C, S, S) to (M, out_channels).

    Raises:
        UserError: as `check_backbone`.
    """
    _check_type(head, BoxHead, where)
    if not isinstance(out_channels := getattr(head, "out_channels", None), int):
        raise UserError(f"{where}: out_channels is {out_channels!r}; set it to the number of channels that it returns")
    pooled = torch.empty(3, in_channels, resolution, resolution)
    output = _call(head, pooled, where, f"pooled features {tuple(pooled.shape)}")
    if _shape(output) != (3, out_channels):
        raise UserError(
            f"{where}: returns {_shape(output)} for pooled features {tuple(pooled.shape)}, and not {(3, out_channels)}"
        )
    _check_gradients(head, [output], where)


def _check_type(part: Any, base: type, where: str) -> None:
    if not isinstance(part, base):
        raise UserError(f"{where}: is a {type(part).__name__}; derive the class from {base.__module__}.{base.__name__}")


def _call(module: nn.Module, x: Any, where: str, what: str) -> Any:
    try:
        with torch.enable_grad():
            return module(x)
    except Exception as error:  # a part may raise anything
        file = Path(inspect.getfile(type(module))).resolve()  # of the user's class
        line = raising_line(error, lambda path: path.is_relative_to(file.parent) and not path.is_relative_to(PACKAGE))
        if isinstance(error, NotImplementedError) and not line:  # the base's
            raise UserError(f"{where}: class {type(module).__name__} of {file} has no method forward; define it") from None
        text = f"{line}{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{where}: fails on {what}: {text}{meta_hint(text)}") from error


def _check_maps(module: nn.Module, x: Any, levels: Sequence[Level], size: tuple[int, int], where: str, image: str) -> Features:
    """Return the maps of an image of `size` after a check of their names and shapes."""
    image = f"{image} of {size[0]} x {size[1]}"
    maps = _call(module, x, where, image)
    names = [level.name for level in levels]
    if not isinstance(maps, dict) or list(maps) != names:
        got = ", ".join(maps) if isinstance(maps, dict) else type(maps).__name__
        raise UserError(f"{where}: returns {got}; it must return a dictionary of the maps {', '.join(names)}, in this order")
    for level in levels:
        expected, shape = (2, level.channels, *_cells(level, size)), _shape(maps[level.name])
        if shape != expected:
            raise UserError(
                f"{where}: {level.name} of {image} has shape {shape}, and must have {expected}: "
                f"{level.channels} channels, and ceil(side / {level.stride}) cells"
            )
    return maps


def _check_gradients(module: nn.Module, outputs: Iterable[Tensor], where: str) -> None:
    """Check that each trainable parameter has a gradient; one without is built for nothing."""
    if not any(p.requires_grad for p in module.parameters()):
        return
    with torch.enable_grad():
        torch.stack([x.sum() for x in outputs]).sum().backward()
    idle = [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
    if idle:
        more = f" and {len(idle) - 3} more" if len(idle) > 3 else ""
        raise UserError(f"{where}: no output depends on {', '.join(idle[:3])}{more}: leave out what is not used")


def _shape(x: Any) -> tuple[int, ...] | str:
    """Return a tensor's shape, or the name of the type of anything else."""
    return tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__


def _cells(level: Level, size: tuple[int, int]) -> tuple[int, ...]:
    return tuple(math.ceil(side / level.stride) for side in size)

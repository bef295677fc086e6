"""Rename the tensors of timm's networks to ours."""

from pathlib import Path

from torch import Tensor

from fpn_ablate.model.backbones.timm import timm_backbone
from fpn_ablate.utils.errors import UserError
from fpn_ablate.weights.layout import misfit, shapes_of


def timm_weights(model: str, path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The `state` of a file, in timm's names or in ours, in our names.

    Raises:
        UserError: it does not fit; `path` is for the message.
    """
    wanted = timm_backbone(model).state_dict()
    state = {name.removeprefix("backbone."): value for name, value in state.items()}  # a whole detector's
    renamed = {ours: state[theirs] for ours in wanted for theirs in _names(ours) if theirs in state}
    if problem := misfit(shapes_of(wanted), shapes_of(renamed)):
        raise UserError(f"{path} does not fit backbone=timm/{model}: {problem}")
    return renamed


def _names(ours: str) -> list[str]:
    """Our name, and what timm may call the same tensor: `stages.c3.stages_1.0.conv.weight` is its `stages.1.0.conv.weight`,
    and `stages.stem.conv_stem.weight` its `conv_stem.weight`."""
    _, _, rest = ours.split(".", 2)
    child, dot, tail = rest.partition(".")
    bars = [n for n, letter in enumerate(child) if letter == "_"]
    return [ours, rest, *(f"{child[:n]}.{child[n + 1 :]}{dot}{tail}" for n in bars)]

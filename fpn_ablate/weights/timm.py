"""Rename the tensors of timm's networks to our names."""

from pathlib import Path

from torch import Tensor

from fpn_ablate.config.parts import TimmBackbone
from fpn_ablate.model.backbones.timm import timm_backbone
from fpn_ablate.utils.errors import UserError
from fpn_ablate.weights.loading import misfit


def timm_weights(config: TimmBackbone, path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict in timm's names or in ours, such as a whole detector's, as the backbone's in our names.

    Raises:
        UserError: it does not fit timm's network; `path` is for the message.
    """
    network = timm_backbone(config).state_dict()
    state = {name.removeprefix("backbone."): value for name, value in state.items()}  # a whole detector's
    renamed = {name: state[candidate] for name in network for candidate in _candidates(name) if candidate in state}
    if problem := misfit(network, renamed):
        raise UserError(f"{path} does not fit backbone={config.label}: {problem}")
    return renamed


def _candidates(name: str) -> list[str]:
    """Return our name of a tensor and timm's possible names of it.

    `stages.c3.stages_1.0.conv.weight` is timm's `stages.1.0.conv.weight`; `stages.stem.conv_stem.weight` is `conv_stem.weight`.
    """
    _, _, rest = name.split(".", 2)
    child, dot, tail = rest.partition(".")
    underscores = [n for n, letter in enumerate(child) if letter == "_"]
    return [name, rest, *(f"{child[:n]}.{child[n + 1 :]}{dot}{tail}" for n in underscores)]

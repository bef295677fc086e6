"""Read which of several processes this one is, where torchrun or srun starts one a GPU for the same command."""

import os
from typing import NamedTuple

from fpn_ablate.utils.errors import UserError


class Launched(NamedTuple):
    """Number of a process, from 0, and how many there are."""

    rank: int
    size: int


def launched_rank() -> Launched | None:
    """Return RANK and WORLD_SIZE, as torchrun sets them; None: this process is alone.

    Raises:
        UserError: WORLD_SIZE is set without the others, or one of them is no number.
    """
    size = _number("WORLD_SIZE", 1)
    if size == 1:
        return None
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"WORLD_SIZE={size}, but {', '.join(missing)} is not set: torchrun sets them all; without it, unset WORLD_SIZE"
        )
    _number("MASTER_PORT")  # torch's own error does not name it
    return Launched(_number("RANK"), size)


def _number(name: str, default: int = 0) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise UserError(f"{name}={text}: torchrun and srun set it to a number; unset it")
    return int(text)

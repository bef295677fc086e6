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
        UserError: WORLD_SIZE is set without the others.
    """
    for name in ("WORLD_SIZE", "RANK"):
        if not os.environ.get(name, "").isdecimal() and os.environ.get(name):
            raise UserError(f"{name}={os.environ[name]}: torchrun and srun set it to a number; unset it")
    if int(os.environ.get("WORLD_SIZE") or 1) == 1:
        return None
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set: torchrun sets them all; "
            "without it, unset WORLD_SIZE"
        )
    return Launched(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))

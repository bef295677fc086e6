"""Share the GPUs of a host between the jobs on it: a job claims the one that the fewest others have claimed.

A claim is a name that the kernel gives to one process (an abstract Unix socket): it ends with the process however that ends,
leaves no file, and is seen by all users of the host. Containers with networks of their own do not see each other's claims. A
GPU is called as CUDA_VISIBLE_DEVICES calls it. torch reads that variable when it first uses a GPU, so a claim comes before.
"""

import os
import socket
from pathlib import Path

from fpn_ablate.utils.console import log_line

VARIABLE = "CUDA_VISIBLE_DEVICES"
MOST = 64  # jobs on one GPU

_claims: dict[str, socket.socket] = {}  # of this process, as long as it lives
_choice: list[str] = []  # the GPUs that were visible before this process claimed any


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use: those of CUDA_VISIBLE_DEVICES, else of /dev/nvidia*. Loads no torch."""
    if _choice:
        return list(_choice)
    if VARIABLE not in os.environ:
        return [str(number) for number, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]
    gpus = [entry.strip() for entry in os.environ[VARIABLE].split(",")]
    # CUDA reads up to the first entry that names no GPU: -1, or a word such as NoDevFiles.
    valid = [entry.isdecimal() or entry.startswith(("GPU-", "MIG-")) for entry in gpus]
    return gpus[: valid.index(False)] if False in valid else gpus


def free_gpus() -> list[str]:
    """Return the visible GPUs that no other process has claimed."""
    free = []
    for gpu in visible_gpus():
        claim = None if gpu in _claims else _claim(gpu, 0)
        if claim:
            claim.close()
        if claim or gpu in _claims:
            free.append(gpu)
    return free


def claim_gpus(count: int = 1) -> list[str]:
    """Claim `count` GPUs until this process ends, and let CUDA_VISIBLE_DEVICES name them; return all that it has claimed.

    If only `count` GPUs are visible, as in a job of SLURM or Ray, they are kept. If all are claimed, jobs share them evenly.
    Without a GPU nothing happens. A second call claims what the first one lacks.
    """
    _choice[:] = _choice or visible_gpus()
    for place in range(MOST):
        for gpu in _choice:
            if len(_claims) < count and gpu not in _claims and (claim := _claim(gpu, place)):
                _claims[gpu] = claim
                if len(_choice) > count:
                    log_line(f"on GPU {gpu}{f', which {place} more use, as none is free' if place else ''}")
    claimed = [gpu for gpu in _choice if gpu in _claims]
    if claimed:
        os.environ[VARIABLE] = ",".join(claimed)
    return claimed


def gpu_models() -> set[str]:
    """Return the product names of the host's NVIDIA GPUs, as the driver gives them."""
    lines = [line for file in Path("/proc/driver/nvidia/gpus").glob("*/information") for line in file.read_text().splitlines()]
    return {line.partition(":")[2].strip() for line in lines if line.startswith("Model:")}


def _claim(gpu: str, place: int) -> socket.socket | None:
    """Take one of the places on a GPU; None if it is taken, or where the system has no such names."""
    claim = socket.socket(socket.AF_UNIX)
    try:
        claim.bind(f"\0fpn_ablate/gpu/{gpu}/{place}")
    except OSError:
        claim.close()
        return None
    return claim

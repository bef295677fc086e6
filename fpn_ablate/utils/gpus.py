"""Share the GPUs of a host between the jobs on it: a job claims the one that the fewest others have claimed.

A claim is a name that the kernel gives to one process (an abstract Unix socket): it ends with the process however that ends,
leaves no file, and is seen by all users of the host. Containers with networks of their own do not see each other's claims. A
GPU is called as CUDA_VISIBLE_DEVICES calls it. torch reads that variable when it first uses a GPU, so a claim comes before.
"""

import os
import re
import socket
from pathlib import Path

from fpn_ablate.utils.console import log_line

VARIABLE = "CUDA_VISIBLE_DEVICES"
MAX_JOBS_PER_GPU = 64
NAME = "fpn_ablate/gpu"  # of a claim, before GPU and slot

_claims: dict[str, socket.socket] = {}  # of this process, as long as it lives
_initially_visible: list[str] = []  # before this process claimed any


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use: those of CUDA_VISIBLE_DEVICES, else of /dev/nvidia*. Loads no torch."""
    if _initially_visible:
        return list(_initially_visible)
    if VARIABLE not in os.environ:
        return [str(number) for number, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]
    gpus = [entry.strip() for entry in os.environ[VARIABLE].split(",")]
    # CUDA reads up to the first entry that names no GPU: -1, or a word such as NoDevFiles.
    valid = [entry.isdecimal() or entry.startswith(("GPU-", "MIG-")) for entry in gpus]
    return gpus[: valid.index(False)] if False in valid else gpus


def free_gpus() -> list[str]:
    """Return the visible GPUs that no other process has claimed."""
    try:
        sockets = Path("/proc/net/unix").read_text(errors="replace")
    except OSError:  # no Linux: no claims
        sockets = ""
    claimed = set(re.findall(rf"@{NAME}/(.+)/\d+$", sockets, re.MULTILINE)) - _claims.keys()
    return [gpu for gpu in visible_gpus() if gpu not in claimed]


def claim_gpus(count: int = 1) -> list[str]:
    """Claim `count` GPUs until this process ends, and let CUDA_VISIBLE_DEVICES name them; return all that it has claimed.

    If only `count` GPUs are visible, as in a job of SLURM or Ray, they are kept. If all are claimed, jobs share them evenly.
    Without a GPU nothing happens. A second call claims what the first one lacks.
    """
    _initially_visible[:] = _initially_visible or visible_gpus()
    for slot in range(MAX_JOBS_PER_GPU):
        for gpu in _initially_visible:
            if len(_claims) < count and gpu not in _claims and (claim := _claim(gpu, slot)):
                _claims[gpu] = claim
                if len(_initially_visible) > count:
                    log_line(f"on GPU {gpu}{f', which {slot} more use, as none is free' if slot else ''}")
    claimed = [gpu for gpu in _initially_visible if gpu in _claims]
    if claimed:
        os.environ[VARIABLE] = ",".join(claimed)
    return claimed


def gpu_models() -> set[str]:
    """Return the product names of the host's NVIDIA GPUs, as the driver gives them."""
    lines = [line for file in Path("/proc/driver/nvidia/gpus").glob("*/information") for line in file.read_text().splitlines()]
    return {line.partition(":")[2].strip() for line in lines if line.startswith("Model:")}


def _claim(gpu: str, slot: int) -> socket.socket | None:
    """Take one of the slots of a GPU; None if it is taken, or where the system has no such names."""
    claim = socket.socket(socket.AF_UNIX)
    try:
        claim.bind(f"\0{NAME}/{gpu}/{slot}")
    except OSError:
        claim.close()
        return None
    return claim

"""Describe where a run takes place: device, versions, commit."""

import os
import platform
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from fpn_ablate import __version__
from fpn_ablate.evaluation.coco import evaluator_name
from fpn_ablate.utils.console import COMMAND
from fpn_ablate.utils.paths import PACKAGE


def environment(device: torch.device) -> dict[str, Any]:
    """Describe where a run takes place, for its record. Outside a git checkout the commit is None."""
    commit, dirty = _git()
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **(_cuda() if device.type == "cuda" else {}),
        "python": platform.python_version(),
        "evaluator": evaluator_name(),
        "version": __version__,
        "commit": commit,
        "dirty": dirty,
        **({"command": os.environ[COMMAND]} if COMMAND in os.environ else {}),  # what the user typed
    }


def _cuda() -> dict[str, Any]:
    """Return the versions that a GPU's results depend on, and where fp32 is computed in TF32 (`precision.set_tf32`)."""
    tf32 = {"convolutions": torch.backends.cudnn.allow_tf32, "products": torch.backends.cuda.matmul.allow_tf32}
    return {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "tf32": tf32}


def machine(device: torch.device) -> dict[str, Any]:
    """Describe what measured times depend on: processor, cores, memory and versions, and a GPU's name if `device` is one."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        **({"GPU": device_name(device)} if device.type == "cuda" else {}),
        "processor": f"cpu ({processor()})",
        "cores": os.cpu_count(),
        "memory (GiB)": round(memory / 2**30, 1),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


@lru_cache
def device_name(device: torch.device) -> str:
    """Return a GPU's product name, or "cpu (PROCESSOR)"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({processor()})"


def processor() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@lru_cache
def _git() -> tuple[str | None, bool | None]:
    """Return the commit, and whether tracked files differ from it; (None, None) outside a checkout of this repository."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=PACKAGE, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)
        return git("rev-parse", "--short=12", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None

"""What a row costs where it runs: latency and peak memory."""

import ctypes
import gc
import resource
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from fpn_ablate.config.schema import Recipe
from fpn_ablate.data.loader import evaluation_batches
from fpn_ablate.data.transforms import Resize
from fpn_ablate.engine import procedures
from fpn_ablate.engine.train import autocast

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def latency_ms(fn: Callable[[], object], device: torch.device, warmup: int = 5, runs: int = 30) -> float:
    """Median of `runs` calls of `fn`, in milliseconds, after `warmup` calls that are not counted."""
    times = []
    for _ in range(warmup + runs):
        synchronise(device)
        began = time.perf_counter()
        fn()
        synchronise(device)  # a GPU works on after the call has returned
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times[warmup:])


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done what it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory_mib` begin anew, from what is in use now. Where a system cannot do that, nothing happens."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()  # in pieces of the sizes that an earlier job asked for
        torch.cuda.reset_peak_memory_stats(device)
        return
    gc.collect()
    # What an earlier job has freed, glibc keeps for itself: up to hundreds of MiB that a later job would be charged with.
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):  # not Linux, or a container that does not allow it
        CLEAR_REFS.write_text("5")


def peak_memory_mib(device: torch.device) -> int:
    """Most memory in use since `reset_peak_memory`, in MiB: tensors on the GPU, or resident memory of this process (without
    those that load its images). Where a system cannot reset it, of the process since it began."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    with suppress(OSError):
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return round(int(line.split()[1]) / 2**10)  # kB
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes on macOS, kB elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)


def latency_of(trained: procedures.Trained, recipe: Recipe, device: torch.device) -> float:
    """Milliseconds for the first image of the validation split alone, from pixels to what the task puts out (Sec. 5.2)."""
    batch = next(evaluation_batches(trained.validation, resize=Resize.of(recipe), batch_size=1, count=1)).to(device)

    @torch.no_grad()
    def once() -> None:
        with autocast(recipe.bf16, device):
            trained.predict_end_to_end(batch)

    return round(latency_ms(once, device), 2)

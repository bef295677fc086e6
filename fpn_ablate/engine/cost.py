"""Latency and peak memory of a run."""

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
    """Return the median time of `runs` calls of `fn` in milliseconds, after `warmup` calls that are not counted."""
    times = []
    for _ in range(warmup + runs):
        synchronise(device)
        began = time.perf_counter()
        fn()
        synchronise(device)  # the call returns before the GPU has finished
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times[warmup:])


def synchronise(device: torch.device) -> None:
    """Wait for a GPU to finish its queued work; on a CPU there is none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak that `peak_memory_mib` returns to the memory in use now; do nothing on systems without a reset."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()  # blocks of the sizes that an earlier job requested
        torch.cuda.reset_peak_memory_stats(device)
        return
    gc.collect()
    # glibc keeps memory that an earlier job has freed: up to hundreds of MiB that would count for a later job.
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):  # not Linux, or a container that does not allow it
        CLEAR_REFS.write_text("5")


def peak_memory_mib(device: torch.device) -> int:
    """Return the peak memory since `reset_peak_memory` in MiB: of tensors on the GPU, or resident memory of this process.

    Loader processes do not count. On systems without a reset it is the peak since the process began.
    """
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    with suppress(OSError):
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return round(int(line.split()[1]) / 2**10)  # kB
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes on macOS, kB elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)


def end_to_end_latency_ms(trained: procedures.Trained, recipe: Recipe, device: torch.device) -> float:
    """Measure the latency of the first validation image at batch size 1, from pixels to the task's output (Sec. 5.2)."""
    return round(latency_ms(_predict_first(trained, recipe, device), device), 2)


def end_to_end_memory_mib(trained: procedures.Trained, recipe: Recipe, device: torch.device) -> int:
    """Measure the memory in MiB that the same prediction takes at its peak, beyond the weights and all else that is in use."""
    predict = _predict_first(trained, recipe, device)
    predict()  # allocates what libraries keep
    reset_peak_memory(device)
    before = peak_memory_mib(device)
    predict()
    return peak_memory_mib(device) - before


def _predict_first(trained: procedures.Trained, recipe: Recipe, device: torch.device) -> Callable[[], None]:
    """Return a function that predicts on the first validation image."""
    batch = next(evaluation_batches(trained.validation, resize=Resize.of(recipe), batch_size=1, count=1)).to(device)

    @torch.no_grad()
    def predict() -> None:
        with autocast(recipe.bf16, device):
            trained.predict_end_to_end(batch)

    return predict

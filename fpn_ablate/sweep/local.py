"""Run rows of a sweep at once on this machine, each in a process of joblib's."""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher

from fpn_ablate.config.schema import Config

MEMORY = 4 * 2**30  # bytes that `auto` keeps for a row; a row of `quick` takes 1.6 GiB


class LocalLauncher:
    """Launch jobs in turn in this process, or `jobs` at once: small convolutions gain more from that than from threads.

    On two cores two rows of `quick` at once, one thread each, take 0.8 of the time of one after the other on two threads.
    """

    def __init__(self, in_turn: Launcher, arguments: dict[str, Any]) -> None:
        self.in_turn, self.arguments, self.jobs = in_turn, arguments, 1  # arguments: of a launcher's `setup`

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        if self.jobs == 1:
            return self.in_turn.launch(job_overrides, initial_job_idx)
        from hydra_plugins.hydra_joblib_launcher.joblib_launcher import JoblibLauncher

        launcher = JoblibLauncher(n_jobs=self.jobs)
        launcher.setup(**self.arguments)
        return launcher.launch(job_overrides, initial_job_idx)


def rows_at_once(cells: Sequence[Config]) -> int:
    """Return how many of these rows run at once: `jobs`, of which `auto` means what the device, cores and memory allow."""
    jobs, threads = cells[0].jobs, cells[0].threads or 1
    if jobs == "auto":
        from joblib import cpu_count

        alone = len(cells) == 1 or any(map(_uses_gpu, cells))
        processes, ranks = max(threads, 1 + cells[0].workers), cells[0].gpus
        jobs = 1 if alone else max(1, min(cpu_count() // processes, _memory() // MEMORY) // ranks)
    return min(jobs, len(cells))


def _uses_gpu(cfg: Config) -> bool:
    import torch  # which takes seconds, and finished cells do not need

    return cfg.device == "cuda" or (cfg.device == "auto" and torch.cuda.is_available())


def _memory() -> int:
    """Return the bytes of the machine's memory, or of the container's if that has less."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # no such file, or "max"
            limits.append(int(Path(file).read_text()))
    return min(limits)

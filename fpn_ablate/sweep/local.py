"""Run rows of a sweep at once on this machine, each in a process of its own."""

import os
import sys
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn

from fpn_ablate.config.schema import Config
from fpn_ablate.sweep.jobs import Job, WorkerKilled, failed_return
from fpn_ablate.tracking.progress import Watch
from fpn_ablate.utils import signals
from fpn_ablate.utils.console import log_line
from fpn_ablate.utils.gpus import VARIABLE, free_gpus, visible_gpus

MEMORY = 4 * 2**30  # bytes that `auto` keeps for a row; a row of `quick` takes 1.6 GiB
POLL = 0.3  # seconds between two looks at the progress of the rows
KILLED = "its process was killed; by the system, for want of memory?"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")  # of torch and numpy


class LocalLauncher:
    """Launch jobs in turn in this process, or `jobs` at once: small convolutions gain more from that than from threads.

    On two cores two rows of `quick` at once, one thread each, take 0.8 of the time of one after the other on two threads.

    Each process is a pool of its own, so that one that is killed costs its row alone. That row is tried once more when no other
    runs, as a row that fails for its neighbours' use of memory would then succeed.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments, self.jobs = arguments, 1  # arguments: of a launcher's `setup`
        self.environment: dict[str, str] = {}  # of the processes, for their progress

    def launch(self, job_overrides: Sequence[Job], initial_job_idx: int) -> Sequence[JobReturn]:
        if self.jobs == 1:
            in_turn = BasicLauncher()
            in_turn.setup(**self.arguments)
            return in_turn.launch(job_overrides, initial_job_idx)
        jobs = dict(enumerate(job_overrides, start=initial_job_idx))
        returns = self._launch_at_once(jobs)
        for number, job in jobs.items():
            if isinstance(returns[number]._return_value, WorkerKilled):
                log_line(f"a worker was killed: retrying {' '.join(job)} alone", sys.stderr)
                returns |= self._launch_at_once({number: job})
        return [returns[number] for number in jobs]

    def _launch_at_once(self, jobs: dict[int, Job]) -> dict[int, JobReturn]:
        """Launch jobs, as many at once as `self.jobs`. A process ends once no job is left for it, and its GPU is free.

        After a signal the jobs that run are waited for, and no other begins.
        """
        waiting, running, returns = deque(jobs.items()), {}, {}
        watch = Watch(jobs, min(self.jobs, len(jobs)))
        self.environment = watch.environment
        idle = [self._pool() for _ in range(min(self.jobs, len(jobs)))]
        try:
            while running or (waiting and not signals.pending_signal()):
                while idle and waiting and not signals.pending_signal():
                    number, job = waiting.popleft()
                    future, pool = self._submit(idle.pop(), number, job)
                    running[future] = number, pool
                while idle:
                    idle.pop().shutdown()
                watch.draw()
                for future in wait(running, POLL, return_when=FIRST_COMPLETED).done:
                    number, pool = running.pop(future)
                    watch.ended.add(number)
                    idle.append(pool)
                    try:
                        returns[number] = future.result()
                    except BrokenProcessPool:
                        returns[number] = failed_return(jobs[number], WorkerKilled(KILLED))
        finally:
            for pool in (*idle, *(pool for _, pool in running.values())):
                pool.shutdown(kill_workers=bool(running))
            watch.close()
        signals.raise_if_stopped()
        return returns

    def _submit(self, pool: Executor, number: int, job: Job) -> tuple[Future[JobReturn], Executor]:
        """Submit a job to a pool, or to a new one if the pool's process was killed."""
        from hydra_plugins.hydra_joblib_launcher._core import execute_job

        hydra = [self.arguments[name] for name in ("hydra_context", "config", "task_function")]
        arguments = (number, job, *hydra, Singleton.get_state())
        try:
            return pool.submit(execute_job, *arguments), pool
        except BrokenProcessPool:
            pool = self._pool()
            return pool.submit(execute_job, *arguments), pool

    def _pool(self) -> Executor:
        """Make a pool of one process, with its share of the cores unless the environment says how many threads to use."""
        from joblib import cpu_count
        from joblib.externals.loky import ProcessPoolExecutor

        threads = str(max(1, cpu_count() // self.jobs))
        environment = self.environment | {name: os.environ.get(name, threads) for name in THREADS}
        if gpus := visible_gpus():  # also those that this process has not claimed
            environment[VARIABLE] = ",".join(gpus)
        return ProcessPoolExecutor(1, env=environment)


def rows_at_once(cells: Sequence[Config], n_jobs: int = -1) -> int:
    """Return how many of these rows run at once: `jobs`, of which `auto` means what the machine allows.

    That is one on each GPU that no other job has claimed; without a GPU, what cores and memory allow.

    Args:
        n_jobs: of Hydra's joblib launcher, instead of `jobs`; -1: as many as possible.
    """
    jobs, threads = (n_jobs if n_jobs > 0 else cells[0].jobs), cells[0].threads or 1
    if jobs == "auto":
        from joblib import cpu_count

        if len(cells) == 1:
            jobs = 1
        elif any(cfg.device != "cpu" for cfg in cells) and visible_gpus():
            jobs = max(1, len(free_gpus()) // cells[0].gpus)
        elif any(map(_uses_gpu, cells)):
            jobs = 1
        else:
            processes = max(threads, 1 + cells[0].workers) * cells[0].gpus
            jobs = max(1, min(cpu_count() // processes, _memory() // (MEMORY * cells[0].gpus)))
    return min(jobs, len(cells))


def _uses_gpu(cfg: Config) -> bool:
    """Return whether torch sees a GPU, as one of AMD's, that `visible_gpus` does not see."""
    import torch  # which takes seconds, and finished cells do not need

    return cfg.device == "cuda" or (cfg.device == "auto" and torch.cuda.is_available())


def _memory() -> int:
    """Return the bytes of the machine's memory, or of the container's if that has less."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # no such file, or "max"
            limits.append(int(Path(file).read_text()))
    return min(limits)

"""Start the processes that train a row together with this one, or meet those that torchrun or srun has started.

This process is rank 0. It sends the others each piece of work that they share (`runs.follow`): the row, and the runs that it
builds on. They start when there is the first: a finished run needs none.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from fpn_ablate.config.schema import Config
from fpn_ablate.engine.distributed import ALONE, TIMEOUT, Ranks
from fpn_ablate.utils.errors import RankFailed, UserError
from fpn_ablate.utils.paths import PACKAGE
from fpn_ablate.utils.world import launched_rank

STORE = "fpn_ablate"  # prefix of our keys in torch's store
GRACE = 10  # seconds in which a process ends by itself
_met = False  # this process has met launched ones


@dataclass(frozen=True)
class Work:
    """A run that all ranks carry out.

    Attributes:
        job: the configuration of the job, whose inputs the runs that it builds on share; with rank 0's kind of device.
        cfg, sources: those of `procedures.RunContext`.
        threads, facts: those of rank 0's `state.Run`.
    """

    job: Config
    cfg: Config
    sources: dict[str, Path]
    threads: int
    facts: dict[str, Any]


class RankGroup:
    """The ranks of a job. As a context: the other processes end with it, at once if an error leaves it.

    Raises:
        UserError: the machine has fewer GPUs, or another number of processes was launched.
    """

    def __init__(self, job: Config, device: torch.device) -> None:
        self.device, self.ranks = device, ALONE
        self.job = job.model_copy(update={"device": device.type})
        self.processes: list[subprocess.Popen] = []
        launched = launched_rank()
        if launched and launched.size != job.gpus:
            raise UserError(f"gpus={job.gpus}, but {launched.size} processes were launched: set gpus={launched.size}")
        visible = torch.cuda.device_count()
        if device.type == "cuda" and not launched and job.gpus > visible:
            raise UserError(f"gpus={job.gpus}: torch sees {visible} here; for GPUs of several machines use torchrun or srun")

    def send(self, cfg: Config, sources: dict[str, Path], threads: int, facts: dict[str, Any]) -> Ranks:
        """Let the other ranks begin with a run; return the ranks that carry it out."""
        if self.job.gpus > 1:
            if self.ranks.size == 1:
                self.ranks = self._start()
                self.ranks.broadcast(self.device)
                self.ranks = self.ranks.on(self.device)
            self.ranks.broadcast(Work(self.job, cfg, sources, threads, facts))
        return self.ranks

    def __enter__(self) -> "RankGroup":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.ranks.size > 1:
            if error is None:
                with suppress(RankFailed):  # one that was lost after its work
                    self.ranks.broadcast(None)
            dist.destroy_process_group()
        for process in self.processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE if error is None else 0)
            process.kill()
            process.wait()

    def _start(self) -> Ranks:
        if launched_rank():
            return meet(self._which_ended)
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = {"WORLD_SIZE": str(self.job.gpus), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
        # As where this process has found the package: by its working folder, or by a path that was added.
        shared |= {"PYTHONPATH": os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))}
        for rank in range(1, self.job.gpus):
            environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
            environment |= shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, "-m", "fpn_ablate.runs.follow"]
            self.processes.append(subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL))
        # Connecting would wait for a process that has failed to start.
        while not all(store.check([f"{STORE}/{rank}"]) for rank in range(1, self.job.gpus)):
            if any(process.poll() is not None for process in self.processes):
                raise RankFailed(self._which_ended())
            time.sleep(0.05)
        return Ranks.connect(dist.PrefixStore(STORE, store), 0, self.job.gpus, self._which_ended)

    def _which_ended(self) -> str:
        """Say which process has ended, and how. The kernel closes its connections shortly before that shows."""
        deadline = time.monotonic() + GRACE
        while self.processes and time.monotonic() < deadline:
            for rank, process in enumerate(self.processes, start=1):
                if code := process.poll():
                    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
                    reason = ", by the system for want of memory?" if code == -9 else ""
                    return f"the process of rank {rank} {how}{reason}"
            time.sleep(0.05)
        return "the process of another rank has ended; its own output may say why"


def meet(lost: Callable[[], str]) -> Ranks:
    """Connect with the other processes as RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say."""
    global _met
    _met = True
    store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    store = dist.PrefixStore(STORE, store)
    store.set(str(rank), "")
    return Ranks.connect(store, rank, size, lost)


def dismiss() -> None:
    """Let launched processes end if rank 0 has had no work for them."""
    if _met:
        return
    ranks = meet(lambda: "the process of another rank has ended")
    ranks.broadcast(None)
    dist.destroy_process_group()

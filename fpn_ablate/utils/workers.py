"""Stop a loader's worker processes within about a second of the end of their use."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.process import BaseProcess
from typing import TypeVar

EXIT_TIMEOUT = 1.0  # seconds that all workers together get to exit by themselves
T = TypeVar("T", bound=Iterator)


def ignore_signals(worker: int = 0) -> None:
    """Ignore SIGTERM and Ctrl-C in a loader's worker process; meant as a `worker_init_fn`.

    A signal to the whole process group then leaves the workers alive until the training has finished its step. They exit with
    their parent, however that ends. Wrap the loader's iterator in `kill_slow_workers`.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def kill_slow_workers(batches: T) -> T:
    """Return a DataLoader's iterator, changed so that workers still alive EXIT_TIMEOUT after its release are killed.

    torch would wait 5 s for each worker, send SIGTERM, which `ignore_signals` ignores, and wait 5 s more; Python would send
    SIGTERM at its own exit and wait for ever.
    """
    workers: Sequence[BaseProcess] = tuple(getattr(batches, "_workers", ()))
    for worker in workers:
        # torch calls `join` after it has told the workers to exit, and Python at its own exit. A worker killed earlier might
        # leave a lock that torch then waits for.
        worker.join = partial(_join_or_kill, worker, workers)
    return batches


def _join_or_kill(worker: BaseProcess, workers: Sequence[BaseProcess], timeout: float | None = None) -> None:
    vars(worker).pop("join", None)  # breaks a reference cycle
    with suppress(RuntimeError):  # raised by torch for a killed process
        worker.join(EXIT_TIMEOUT)
    if worker.is_alive():
        for other in workers:
            other.kill()
        for other in workers:
            vars(other).pop("join", None)
            with suppress(RuntimeError):
                other.join(EXIT_TIMEOUT)

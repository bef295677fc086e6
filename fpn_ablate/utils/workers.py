"""Let the worker processes of a loader end with their parent, and within a moment."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.process import BaseProcess
from typing import TypeVar

MOMENT = 1.0  # seconds for processes that load images to end by themselves, all together
T = TypeVar("T", bound=Iterator)


def ignore_signals(worker: int = 0) -> None:
    """In a process that loads images: a signal to the whole group must not take it from a training that ends its step.

    Nothing stays behind: such a process ends with its parent, whatever that dies of. What iterates over its batches is to be
    `ended_soon`.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def kill_slow_workers(batches: T) -> T:
    """The iterator of a DataLoader; where its processes do not end within a MOMENT once it is let go, they are killed.

    torch waits 5 s for each, then sends SIGTERM, which `leave_to_parent` ignores, and waits 5 s more; Python, at its own exit,
    sends SIGTERM and waits for ever.
    """
    workers: Sequence[BaseProcess] = tuple(getattr(batches, "_workers", ()))
    for worker in workers:
        # What torch calls after it has asked them to end, and Python at its exit. To kill one before might leave a lock that
        # torch then waits for.
        worker.join = partial(_join_or_kill, worker, workers)
    return batches


def _join_or_kill(worker: BaseProcess, workers: Sequence[BaseProcess], timeout: float | None = None) -> None:
    vars(worker).pop("join", None)  # a circle of references
    with suppress(RuntimeError):  # torch's answer to a process that is killed
        worker.join(MOMENT)
    if worker.is_alive():
        for other in workers:
            other.kill()
        for other in workers:
            vars(other).pop("join", None)
            with suppress(RuntimeError):
                other.join(MOMENT)

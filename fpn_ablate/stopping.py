"""SIGTERM and Ctrl-C: a training ends its step and leaves a checkpoint, anything else stops at once.

A step is waited for no longer than PATIENCE; after that the checkpoint is the last regular one. A second Ctrl-C does not wait.
Exit codes are 128 + the signal's number: 143 after SIGTERM (what SLURM sends to a job that it preempts, so `RequeueExit=143` in
slurm.conf, or `scontrol requeue` in the job's script, starts it again), 130 after Ctrl-C.

Only the process that listens is asked. Its forks, which load images, leave signals to it; the workers of joblib are told by it.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import TypeVar

PATIENCE = 7.0  # seconds for the step that is under way; a checkpoint and a record have to be written within the 10 after it
WORKERS = 2.5  # seconds more for joblib's workers, which end as many steps
MOMENT = 1.0  # seconds for processes that load images to end by themselves, all together
# Taken only where Python's own answer stands: whoever has installed another (submitit, nohup) means it.
_USUAL = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler, signal.SIGALRM: signal.SIG_DFL}


T = TypeVar("T", bound=Iterator)


class Stopped(KeyboardInterrupt):
    """A signal has asked for an end. No Exception, so that nothing takes it for the failure of a row."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.code = 128 + number


@dataclass
class _State:
    process: int = 0  # that listens
    asked: int = 0  # number of the first signal; 0: none
    patient: bool = False  # at work on a step, and will look by itself
    jobs: int = 0  # cells that this very process is carrying out


_state = _State()


def listen() -> list[int]:
    """From now on take the signals as a wish to stop; returns those that are taken, none where it is done already.

    Nothing happens outside the main thread.
    """
    if _state.process == os.getpid() or threading.current_thread() is not threading.main_thread():
        return []
    taken = [number for number, usual in _USUAL.items() if signal.getsignal(number) == usual]
    _reset(os.getpid())
    for number in taken:
        signal.signal(number, _too_late if number == signal.SIGALRM else _take)
    return taken


@contextmanager
def listening() -> Iterator[None]:
    """Listen for as long as the context lasts."""
    taken = listen()
    try:
        yield
    finally:
        if taken:
            hurry_no_more()
            for number in taken:
                signal.signal(number, _USUAL[number])
            _reset(0)


def asked() -> int:
    """The number of the signal that asks this process to stop; 0 without one."""
    return _state.asked if _state.process == os.getpid() else 0


def check() -> None:
    """Raises `Stopped` if that is asked for."""
    if asked():
        raise Stopped(asked())


@contextmanager
def meant() -> Iterator[None]:
    """Errors, and exits of Hydra, that come of a signal are raised as `Stopped`: an extension module that is interrupted while
    it is imported says ImportError, a loader whose process is gone RuntimeError."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if asked():
            raise Stopped(asked()) from error
        raise


def hurry_no_more() -> None:
    """The end has begun, and is not to be hurried any more."""
    if asked():  # else the timer, if there is one, is somebody else's
        signal.setitimer(signal.ITIMER_REAL, 0)


@contextmanager
def between_steps() -> Iterator[None]:
    """For a loop that asks `asked` at each step, so that nothing tears one apart. Raises `Stopped`."""
    check()
    with patient():
        yield
    check()


@contextmanager
def patient() -> Iterator[None]:
    """For what must not be torn apart, and is over in a moment; who asks for an end hears of it at the next `check`."""
    before, _state.patient = _state.patient, True
    try:
        yield
    finally:
        _state.patient = before


@contextmanager
def job() -> Iterator[None]:
    """While a cell is carried out in this process: its child processes are none of joblib's workers. Raises `Stopped`."""
    check()
    _state.jobs += 1
    try:
        yield
    finally:
        _state.jobs -= 1


def leave_to_parent(worker: int = 0) -> None:
    """In a process that loads images: a signal to the whole group must not take it from a training that ends its step.

    Nothing stays behind: such a process ends with its parent, whatever that dies of. What iterates over its batches is to be
    `ended_soon`.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def ended_soon(batches: T) -> T:
    """The iterator of a DataLoader; where its processes do not end within a MOMENT once it is let go, they are killed.

    torch waits 5 s for each, then sends SIGTERM, which `leave_to_parent` ignores, and waits 5 s more; Python, at its own exit,
    sends SIGTERM and waits for ever.
    """
    workers: Sequence[BaseProcess] = tuple(getattr(batches, "_workers", ()))
    for worker in workers:
        # What torch calls after it has asked them to end, and Python at its exit. To kill one before might leave a lock that
        # torch then waits for.
        worker.join = partial(_joined, worker, workers)
    return batches


def _joined(worker: BaseProcess, workers: Sequence[BaseProcess], timeout: float | None = None) -> None:
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


def _take(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _state.process:  # a fork: as if nobody listened
        signal.signal(number, _USUAL[number])
        os.kill(os.getpid(), number)
        return
    again, _state.asked = _state.asked, _state.asked or number
    if again and number == signal.SIGTERM:
        return
    workers = () if _state.jobs else multiprocessing.active_children()
    if not again:
        signal.setitimer(signal.ITIMER_REAL, PATIENCE + WORKERS * bool(workers), 1.0)  # again, should one be swallowed
        for worker in workers:
            worker.terminate()
        if workers or _state.patient:
            return
    raise Stopped(_state.asked)


def _too_late(number: int, frame: FrameType | None) -> None:
    if asked():
        raise Stopped(asked())


def _reset(process: int) -> None:
    _state.process, _state.asked, _state.patient, _state.jobs = process, 0, False, 0

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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

PATIENCE = 7.0  # seconds for the step that is under way; a checkpoint and a record have to be written within the 10 after it
WORKERS = 2.5  # seconds more for joblib's workers, which end as many steps
# Taken only where Python's own answer stands: whoever has installed another (submitit, nohup) means it.
_DEFAULT_HANDLERS = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler, signal.SIGALRM: signal.SIG_DFL}


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


def install_handlers() -> list[int]:
    """From now on take the signals as a wish to stop; returns those that are taken, none where it is done already.

    Nothing happens outside the main thread.
    """
    if _state.process == os.getpid() or threading.current_thread() is not threading.main_thread():
        return []
    taken = [number for number, usual in _DEFAULT_HANDLERS.items() if signal.getsignal(number) == usual]
    _reset(os.getpid())
    for number in taken:
        signal.signal(number, _on_deadline if number == signal.SIGALRM else _on_signal)
    return taken


@contextmanager
def handling_signals() -> Iterator[None]:
    """Listen for as long as the context lasts."""
    taken = install_handlers()
    try:
        yield
    finally:
        if taken:
            cancel_deadline()
            for number in taken:
                signal.signal(number, _DEFAULT_HANDLERS[number])
            _reset(0)


def pending_signal() -> int:
    """The number of the signal that asks this process to stop; 0 without one."""
    return _state.asked if _state.process == os.getpid() else 0


def raise_if_stopped() -> None:
    """Raises `Stopped` if that is asked for."""
    if pending_signal():
        raise Stopped(pending_signal())


@contextmanager
def reraise_as_stopped() -> Iterator[None]:
    """Errors, and exits of Hydra, that come of a signal are raised as `Stopped`: an extension module that is interrupted while
    it is imported says ImportError, a loader whose process is gone RuntimeError."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if pending_signal():
            raise Stopped(pending_signal()) from error
        raise


def cancel_deadline() -> None:
    """The end has begun, and is not to be hurried any more."""
    if pending_signal():  # else the timer, if there is one, is somebody else's
        signal.setitimer(signal.ITIMER_REAL, 0)


@contextmanager
def between_steps() -> Iterator[None]:
    """For a loop that asks `asked` at each step, so that nothing tears one apart. Raises `Stopped`."""
    raise_if_stopped()
    with defer_interrupts():
        yield
    raise_if_stopped()


@contextmanager
def defer_interrupts() -> Iterator[None]:
    """For what must not be torn apart, and is over in a moment; who asks for an end hears of it at the next `check`."""
    before, _state.patient = _state.patient, True
    try:
        yield
    finally:
        _state.patient = before


@contextmanager
def running_job() -> Iterator[None]:
    """While a cell is carried out in this process: its child processes are none of joblib's workers. Raises `Stopped`."""
    raise_if_stopped()
    _state.jobs += 1
    try:
        yield
    finally:
        _state.jobs -= 1


def _on_signal(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _state.process:  # a fork: as if nobody listened
        signal.signal(number, _DEFAULT_HANDLERS[number])
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


def _on_deadline(number: int, frame: FrameType | None) -> None:
    if pending_signal():
        raise Stopped(pending_signal())


def _reset(process: int) -> None:
    _state.process, _state.asked, _state.patient, _state.jobs = process, 0, False, 0

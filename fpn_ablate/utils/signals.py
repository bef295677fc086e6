"""Handle SIGTERM, SIGUSR2 and Ctrl-C: a training finishes its step and saves a checkpoint; anything else stops at once.

A first Ctrl-C is answered at once, in a line that says what is finished before the process ends; a second one does not wait
for the step. Exit codes are 128 + the signal's number: 143 after SIGTERM (what SLURM sends to a
job that it preempts, so `RequeueExit=143` in slurm.conf, or `scontrol requeue` in the job's script, starts it again), 140 after
SIGUSR2 (what `sbatch --signal=USR2@120` sends two minutes before the limit), 130 after Ctrl-C. A run that is killed within its
step, as by Docker 10 s after SIGTERM, continues from its last regular checkpoint.

Only the process that installed the handlers reacts: its loader workers outlive the signal, and joblib's get it from there.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

LOADER_GRACE = 10  # seconds by which a loader's worker outlives a signal
PARENT_GRACE = 60  # seconds in which a worker whose parent was killed finishes its step
# Only handlers that are still Python's defaults are replaced: another one (of submitit, nohup) was installed on purpose.
_DEFAULT_HANDLERS = {
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGINT: signal.default_int_handler,
    signal.SIGUSR2: signal.SIG_DFL,
}


class Stopped(KeyboardInterrupt):
    """A signal asked this process to stop. Not an Exception, so that nothing mistakes it for a failed row."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.code = 128 + number


@dataclass
class _State:
    handler_pid: int = 0  # the process that installed the handlers
    first_signal: int = 0  # number of the first signal received; 0: none
    deferring: bool = False  # the code that runs polls `pending_signal` itself, so do not raise


_state = _State()
_job_runs = False  # in this process


class Listener(Protocol):
    """Says to the user what a first signal leads to: a progress display."""

    def on_deferred(self) -> str:
        """Return what is finished before a signal ends the process, as `finishing step 312, then saving`."""

    def show(self, line: str) -> None:
        """Print a line at once."""


_listeners: list[Listener] = []


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Let `listener` answer the first signal for the duration of the context."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def install_handlers() -> list[int]:
    """Install the handlers and return the numbers of the signals that they handle.

    Return none outside the main thread, or if this process has installed them before.
    """
    global _state
    if _state.handler_pid == os.getpid() or threading.current_thread() is not threading.main_thread():
        return []
    numbers = [number for number, default in _DEFAULT_HANDLERS.items() if signal.getsignal(number) == default]
    _state = _State(os.getpid())
    for number in numbers:
        signal.signal(number, _on_signal)
    return numbers


@contextmanager
def handling_signals() -> Iterator[None]:
    """Install the handlers for the duration of the context."""
    global _state
    numbers = install_handlers()
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, _DEFAULT_HANDLERS[number])
        _state = _State() if numbers else _state


@contextmanager
def running_job() -> Iterator[None]:
    """Mark this process as running a job: a second Ctrl-C ends a worker that runs none without a traceback."""
    global _job_runs
    before, _job_runs = _job_runs, True
    try:
        yield
    finally:
        _job_runs = before


def pending_signal() -> int:
    """Return the number of the signal that asked this process to stop, or 0."""
    return _state.first_signal if _state.handler_pid == os.getpid() else 0


def raise_if_stopped() -> None:
    """Raise `Stopped` if a signal has asked this process to stop."""
    if pending_signal():
        raise Stopped(pending_signal())


@contextmanager
def reraise_as_stopped() -> Iterator[None]:
    """Re-raise errors, and exits of Hydra, caused by a signal as `Stopped`.

    For example, an extension module whose import is interrupted raises ImportError, a loader that lost a worker RuntimeError.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        if pending_signal():
            raise Stopped(pending_signal()) from error
        raise


@contextmanager
def between_steps() -> Iterator[None]:
    """Defer interrupts in a loop that polls `pending_signal` at each step; raise `Stopped` before or after the loop."""
    raise_if_stopped()
    with defer_interrupts():
        yield
    raise_if_stopped()


@contextmanager
def defer_interrupts() -> Iterator[None]:
    """Defer interrupts in a short block that must run to its end; `raise_if_stopped` raises them afterwards."""
    before, _state.deferring = _state.deferring, True
    try:
        yield
    finally:
        _state.deferring = before


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Defer interrupts in a short block that must run to its end; raise `Stopped` behind it, or behind what encloses it."""
    with defer_interrupts():
        yield
    if not _state.deferring:
        raise_if_stopped()


def outlive_signals(worker: int = 0) -> None:
    """Let a loader's worker process outlive its first signal by LOADER_GRACE; meant as a `worker_init_fn`.

    A signal to the whole process group then leaves the worker alive until the training has finished its step. It ends with its
    parent, however that ends: a second signal, such as Python sends to its children at exit, kills it.
    """

    def on_signal(number: int, frame: FrameType | None) -> None:
        signal.alarm(LOADER_GRACE)
        for signal_number in taken:
            signal.signal(signal_number, signal.SIG_DFL)

    taken = [number for number in _DEFAULT_HANDLERS if signal.getsignal(number) != signal.SIG_IGN]
    for number in taken:
        signal.signal(number, on_signal)


def end_with_parent() -> None:
    """End this process once its parent has ended: as after SIGTERM, with its job, and after PARENT_GRACE in any case.

    You can call it as often as you like.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        limit = time.monotonic() + PARENT_GRACE
        while _job_runs and time.monotonic() < limit:
            time.sleep(0.2)
        os._exit(128 + signal.SIGTERM)

    parent = os.getppid()
    if all(thread.name != watch.__qualname__ for thread in threading.enumerate()):
        threading.Thread(target=watch, name=watch.__qualname__, daemon=True).start()


def _on_signal(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _state.handler_pid:  # a fork: act as without the handlers
        signal.signal(number, _DEFAULT_HANDLERS[number])
        os.kill(os.getpid(), number)
    elif not _state.first_signal:
        _state.first_signal = number
        # Workers of joblib are no daemons, as they have children of their own; those of a loader are.
        workers = [child for child in multiprocessing.active_children() if not child.daemon]
        for worker in workers:
            worker.terminate()
        if not workers and not _state.deferring:
            raise Stopped(number)
        if multiprocessing.parent_process() is None:  # a worker's sweep says it
            _answer(number)
    elif number == signal.SIGINT:  # SIGTERM comes twice: to the group, and from the parent
        if multiprocessing.parent_process() is not None and not _job_runs:
            raise SystemExit(128 + _state.first_signal)
        raise Stopped(_state.first_signal)


def _answer(number: int) -> None:
    """Say at once what is finished before this process ends. The code that was interrupted may be printing itself."""
    finishing = _listeners[-1].on_deferred() if _listeners else "finishing the step, then saving"
    line = f"{signal.Signals(number).name}: {finishing}; Ctrl-C stops now"
    if number == signal.SIGINT:
        line = f"{finishing}; Ctrl-C again: stop now"
    try:
        if _listeners:
            _listeners[-1].show(line)
            return
    except RuntimeError:  # a buffered stream refuses to be entered twice
        pass
    with suppress(OSError):
        os.write(2, f"\n{line}\n".encode())

"""The jobs of one sweep: a row that fails, a worker process that is killed, a wish to stop.

`carried_out` is around each job, in whatever process; `Steadfast` is around Hydra's launcher, in the process of the sweep. They
tell each other things by files in a folder of this sweep (`FOLDER`): which jobs are under way (`3`), which have failed, and of
what (`3.failed`), and that no other is to begin.
"""

import multiprocessing
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import RunMode
from omegaconf import DictConfig

from fpn_ablate.config.composition import cell_config
from fpn_ablate.runs import skip
from fpn_ablate.sweep.checks import as_hydra_error, check_backbone, check_writable
from fpn_ablate.sweep.publish import publish
from fpn_ablate.utils import signals
from fpn_ablate.utils.console import log_line

FOLDER, SWEEP = "FPN_ABLATE_JOBS", "FPN_ABLATE_SWEEP"  # set by the sweep for its jobs: the folder, and the sweep's process
STOP = "stop"  # the file that says so
Job = Sequence[str]  # its overrides


def run_job(composed: DictConfig) -> None:
    """Run one cell; Hydra calls this for each job, in any process.

    What is heavy is imported here, so that a mistyped key and a finished cell are reported at once.
    """
    _use_platform_start_method()
    signals.install_handlers()  # in a worker of joblib or a job of SLURM for good: its other jobs must not begin either
    context = HydraConfig.get()
    single = context.mode == RunMode.RUN
    with as_hydra_error(leave=single):
        cfg = cell_config(composed, context.runtime.choices, context.overrides.task)
        check_backbone(cfg.backbone)
        check_writable(cfg.out)
        number = 0 if single else context.job.num
        try:
            if not skip.report_if_finished(cfg):
                with job_scope(number, cfg.on_failure):
                    from fpn_ablate.runs.run import run  # takes seconds, which a job that must not begin does not have

                    run(cfg, number)
        finally:
            if single:
                publish([cfg])


def _use_platform_start_method() -> None:
    """Start processes in the platform's way: joblib's launcher leaves loky's in its workers, where torch's loader fails."""
    if multiprocessing.get_start_method(allow_none=True) not in (None, *multiprocessing.get_all_start_methods()):
        multiprocessing.set_start_method(None, force=True)


class NotStarted(Exception):
    """Another row of the sweep has failed, and on_failure=stop."""


class WorkerKilled(Exception):
    """Somebody, as a rule the system for want of memory, has killed the process of a job."""


class Failed(Exception):
    """A job's own error, of which only the text is left: the worker that had it is gone."""


class Interrupted(Exception):
    """`stopping.Stopped` on its way out of a worker of joblib, whose other jobs end their steps first."""


@contextmanager
def job_scope(number: int, on_failure: str) -> Iterator[None]:
    """Around the job `number` of a sweep, or around a single run.

    Raises:
        NotStarted: before anything is done.
        Stopped, or in a worker of joblib Interrupted: a signal asks for an end.
    """
    folder = Path(os.environ[FOLDER]) if FOLDER in os.environ else None
    worker = SWEEP in os.environ and os.environ[SWEEP] != str(os.getpid())
    if folder and (folder / STOP).exists():
        raise NotStarted("not started: on_failure=stop, and another row has failed")
    try:
        with signals.reraise_as_stopped(), signals.running_job(), _running_marker(folder, number):
            yield
    except signals.Stopped as stop:
        _release_frames(stop)  # of the processes that load images
        if worker:
            raise Interrupted("a signal asked for it") from None
        raise
    except Exception as error:
        # Hydra keeps the error until the sweep ends, and its frames would keep the row's network and data.
        _release_frames(error)
        if folder:
            _write_marker(folder / f"{number}.failed", f"{type(error).__name__}: {error}")
        if folder and on_failure == "stop":
            _write_marker(folder / STOP)
        raise


class RetryingLauncher:
    """A launcher of Hydra that brings all jobs of a batch to an end of their own, whatever becomes of one.

    A job whose process is killed is tried again, alone, so that none is charged with its neighbour's hunger for memory; if that
    is killed as well, it has failed, and `on_killed` is told its number and why. The returns of all others are lost with it: a
    job that has finished takes a moment to find that out, one that has failed is not begun again. Failures are kept in `failed`
    and do not end the sweep, unless on_failure=stop.
    """

    def __init__(self, launcher: Any, folder: Path, on_killed: Callable[[int, str], None] = lambda number, error: None) -> None:
        self.launcher, self.folder, self.on_killed, self.failed = launcher, folder, on_killed, []
        self.stop = False  # on_failure=stop

    def launch(self, job_overrides: Sequence[Job], initial_job_idx: int) -> Sequence[JobReturn]:
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):
            self.folder.mkdir(parents=True)
        left, returns, for_nothing = dict(enumerate(job_overrides)), {}, 0
        while left:
            try:
                returns |= self._launched(left, initial_job_idx)
                break
            except BrokenProcessPool:
                signals.raise_if_stopped()
                numbers, errors = list(left), self._errors(initial_job_idx)
                suspects = [numbers[place] for place in self._under_way(initial_job_idx) if place not in errors]
                # A worker was killed before it had begun with a job.
                for_nothing = 0 if suspects or errors else for_nothing + 1
                if for_nothing > 2:
                    raise
                for place, error in errors.items():
                    returns[numbers[place]] = _failed_return(left.pop(numbers[place]), error)
                for number in suspects:
                    returns[number] = self._alone(left.pop(number), initial_job_idx + number)
        signals.raise_if_stopped()
        ordered = [returns[number] for number in sorted(returns)]
        return ordered if self.stop else [self._noted(found) for found in ordered]

    def _launched(self, jobs: dict[int, Job], first: int) -> dict[int, JobReturn]:
        for file in self.folder.glob("[0-9]*"):
            file.unlink()
        return dict(zip(jobs, self.launcher.launch(list(jobs.values()), initial_job_idx=first), strict=True))

    def _under_way(self, first: int) -> list[int]:
        """Places, in what was launched last, of the jobs whose processes are gone."""
        return sorted(int(file.name) - first for file in self.folder.glob("[0-9]*") if not file.suffix)

    def _errors(self, first: int) -> dict[int, Failed]:
        """Place of a job in what was launched last -> what it has failed of."""
        return {int(file.stem) - first: Failed(file.read_text("utf-8")) for file in self.folder.glob("[0-9]*.failed")}

    def _alone(self, job: Job, number: int) -> JobReturn:
        log_line(f"the process of {' '.join(job)} was killed, or that of its neighbour: again, alone", sys.stderr)
        try:
            return self._launched({0: job}, number)[0]
        except BrokenProcessPool:
            signals.raise_if_stopped()
        if self.stop:
            _write_marker(self.folder / STOP)
        error = WorkerKilled("its process was killed twice, the second time alone; by the system, for want of memory?")
        self.on_killed(number, f"WorkerKilled: {error}")
        return _failed_return(job, error)

    def _noted(self, found: JobReturn) -> JobReturn:
        """With its failure, if it is one, put aside: Hydra would begin no other batch after it."""
        if found.status == JobStatus.FAILED:
            self.failed.append(found)
            return JobReturn(overrides=found.overrides, status=JobStatus.COMPLETED)
        return found

    def tell(self) -> None:
        """Print what has failed, a line each; raises the first."""
        for found in self.failed:
            error = found._return_value
            text = str(error) if isinstance(error, Failed) else f"{type(error).__name__}: {error}"
            log_line(f"failed: {' '.join(found.overrides)}: {text}", sys.stderr)
        if self.failed:
            raise self.failed[0]._return_value


@contextmanager
def _running_marker(folder: Path | None, number: int) -> Iterator[None]:
    """A file that is left where a process is killed."""
    if folder is None:
        yield
        return
    _write_marker(folder / str(number))
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / str(number)).unlink(missing_ok=True)


def _failed_return(job: Job, error: Exception) -> JobReturn:
    found = JobReturn(overrides=job, status=JobStatus.FAILED)
    found.return_value = error
    return found


def _write_marker(file: Path, text: str = "") -> None:
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, "utf-8", errors="replace")


def _release_frames(error: BaseException | None) -> None:
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__

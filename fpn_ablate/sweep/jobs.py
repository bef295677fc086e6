"""Run the jobs of a sweep, and keep the sweep going when a row fails or a worker process is killed.

`run_job` is a job, in whatever process; `RetryingLauncher` wraps Hydra's launcher, in the process of the sweep. They
communicate by marker files in a folder of the sweep: `3` while job 3 is running, `3.failed` with its error once it has failed,
and `stop` when no further job may begin.
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
from fpn_ablate.config.user_parts import folder_of
from fpn_ablate.runs import skip
from fpn_ablate.sweep.checks import as_hydra_error, check_parts, check_writable
from fpn_ablate.sweep.publish import publish
from fpn_ablate.utils import signals
from fpn_ablate.utils.console import log_line

# Environment variables that the sweep sets for its jobs: the folder of marker files, and the sweep's process id.
FOLDER_VARIABLE, SWEEP_VARIABLE = "FPN_ABLATE_JOBS", "FPN_ABLATE_SWEEP"
STOP = "stop"  # name of the marker file
Job = Sequence[str]  # a job's overrides


def run_job(composed: DictConfig) -> None:
    """Run one cell; Hydra calls this for each job, in any process.

    What is heavy is imported here, so that a mistyped key and a finished cell are reported at once.
    """
    _use_platform_start_method()
    signals.install_handlers()  # in a worker of joblib or a job of SLURM for good: its other jobs must not begin either
    context = HydraConfig.get()
    single = context.mode == RunMode.RUN
    with as_hydra_error(exit_on_error=single):
        config_dir = folder_of(context.runtime.config_sources)
        cfg = cell_config(composed, context.runtime.choices, context.overrides.task, config_dir)
        check_parts(cfg)
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
    """The process of a job was killed; as a rule by the system, for want of memory."""


class Failed(Exception):
    """An error of a job whose worker is gone; only its text is left."""


class Interrupted(Exception):
    """`signals.Stopped` as a worker of joblib reports it: the other workers may still finish their steps."""


@contextmanager
def job_scope(number: int, on_failure: str) -> Iterator[None]:
    """Mark the job `number` as running, and record how it ends; a single run is a job without a folder.

    Raises:
        NotStarted: on_failure=stop, and another row has failed; nothing was done.
        Stopped: a signal asked the process to stop; in a worker of joblib `Interrupted`.
    """
    folder = Path(os.environ[FOLDER_VARIABLE]) if FOLDER_VARIABLE in os.environ else None
    worker = SWEEP_VARIABLE in os.environ and os.environ[SWEEP_VARIABLE] != str(os.getpid())
    if folder and (folder / STOP).exists():
        raise NotStarted("not started: on_failure=stop, and another row has failed")
    try:
        with signals.reraise_as_stopped(), signals.running_job(), _running_marker(folder, number):
            yield
    except signals.Stopped as stop:
        _release_frames(stop)  # they hold the processes that load images
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
    """Wrap a Hydra launcher so that one crashed worker does not abort the batch.

    A job whose process was killed is retried alone, so that no job fails for its neighbour's use of memory. If it is killed
    again, it has failed, and `on_killed(number, error)` is called. A crash loses the returns of all jobs of the batch: a job
    that had finished finds its record in a moment, and one that had failed is not run again. Failures are collected in `failed`
    and do not end the sweep unless on_failure=stop.
    """

    def __init__(self, launcher: Any, folder: Path, on_killed: Callable[[int, str], None] = lambda number, error: None) -> None:
        self.launcher, self.folder, self.on_killed, self.failed = launcher, folder, on_killed, []
        self.stop = False  # on_failure=stop

    def launch(self, job_overrides: Sequence[Job], initial_job_idx: int) -> Sequence[JobReturn]:
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):
            self.folder.mkdir(parents=True)
        pending, returns, idle_crashes = dict(enumerate(job_overrides)), {}, 0
        while pending:
            try:
                returns |= self._launch(pending, initial_job_idx)
                break
            except BrokenProcessPool:
                signals.raise_if_stopped()
                numbers, errors = list(pending), self._errors(initial_job_idx)
                suspects = [numbers[place] for place in self._running(initial_job_idx) if place not in errors]
                # A worker may be killed before it begins with a job; a launcher whose workers never begin is broken.
                idle_crashes = 0 if suspects or errors else idle_crashes + 1
                if idle_crashes > 2:
                    raise
                for place, error in errors.items():
                    returns[numbers[place]] = _failed_return(pending.pop(numbers[place]), error)
                for number in suspects:
                    returns[number] = self._retry_alone(pending.pop(number), initial_job_idx + number)
        signals.raise_if_stopped()
        ordered = [returns[number] for number in sorted(returns)]
        return ordered if self.stop else [self._collect_failure(job_return) for job_return in ordered]

    def _launch(self, jobs: dict[int, Job], first: int) -> dict[int, JobReturn]:
        for file in self.folder.glob("[0-9]*"):
            file.unlink()
        return dict(zip(jobs, self.launcher.launch(list(jobs.values()), initial_job_idx=first), strict=True))

    def _running(self, first: int) -> list[int]:
        """Return the positions, in the last launch, of the jobs that were running when the pool broke."""
        return sorted(int(file.name) - first for file in self.folder.glob("[0-9]*") if not file.suffix)

    def _errors(self, first: int) -> dict[int, Failed]:
        """Return {position in the last launch: error} of the jobs that failed."""
        return {int(file.stem) - first: Failed(file.read_text("utf-8")) for file in self.folder.glob("[0-9]*.failed")}

    def _retry_alone(self, job: Job, number: int) -> JobReturn:
        log_line(f"a worker was killed: retrying {' '.join(job)} alone", sys.stderr)
        try:
            return self._launch({0: job}, number)[0]
        except BrokenProcessPool:
            signals.raise_if_stopped()
        if self.stop:
            _write_marker(self.folder / STOP)
        error = WorkerKilled("its process was killed twice, the second time alone; by the system, for want of memory?")
        self.on_killed(number, f"WorkerKilled: {error}")
        return _failed_return(job, error)

    def _collect_failure(self, job_return: JobReturn) -> JobReturn:
        """Move a failure to `failed` and return a completed job in its place: Hydra starts no batch after a failed one."""
        if job_return.status == JobStatus.FAILED:
            self.failed.append(job_return)
            return JobReturn(overrides=job_return.overrides, status=JobStatus.COMPLETED)
        return job_return

    def raise_first_failure(self) -> None:
        """Print each failure in a line, then raise the first."""
        for job_return in self.failed:
            error = job_return._return_value
            text = str(error) if isinstance(error, Failed) else f"{type(error).__name__}: {error}"
            log_line(f"failed: {' '.join(job_return.overrides)}: {text}", sys.stderr)
        if self.failed:
            raise self.failed[0]._return_value


@contextmanager
def _running_marker(folder: Path | None, number: int) -> Iterator[None]:
    """Keep a marker file while the job runs; it stays behind if the process is killed."""
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
    job_return = JobReturn(overrides=job, status=JobStatus.FAILED)
    job_return.return_value = error
    return job_return


def _write_marker(file: Path, text: str = "") -> None:
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, "utf-8", errors="replace")


def _release_frames(error: BaseException | None) -> None:
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__

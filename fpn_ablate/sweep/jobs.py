"""Run the jobs of a sweep, and keep the sweep going when a row fails or a worker process is killed.

`run_job` is a job, in whatever process; `RetryingLauncher` wraps Hydra's launcher, in the process of the sweep. The state of a
job is the record of its run.
"""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import RunMode
from omegaconf import DictConfig

from fpn_ablate.config.composition import cell_config
from fpn_ablate.config.schema import Config
from fpn_ablate.config.user_parts import folder_of
from fpn_ablate.runs import skip
from fpn_ablate.sweep.checks import as_hydra_error, check_parts, check_writable, reject_unread_keys
from fpn_ablate.sweep.publish import has_ended, mark_killed, publish
from fpn_ablate.utils import signals
from fpn_ablate.utils.console import log_line
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.files import save_text

STOP = "FPN_ABLATE_STOP"  # environment variable: a file of the sweep that holds the first failure, if on_failure=stop
Job = Sequence[str]  # a job's overrides


def run_job(composed: DictConfig) -> None:
    """Run one cell; Hydra calls this for each job, in any process.

    What is heavy is imported here, so that a mistyped key and a finished cell are reported at once.
    """
    _use_platform_start_method()
    signals.install_handlers()  # in a worker of joblib or a job of SLURM for good: its other jobs must not begin either
    context = HydraConfig.get()
    single = context.mode == RunMode.RUN
    cells = []
    try:
        with as_hydra_error(exit_on_error=single):  # a single run's error is printed before its table
            config_dir = folder_of(context.runtime.config_sources)
            cfg = cell_config(composed, context.runtime.choices, context.overrides.task, config_dir)
            if single:  # a sweep has looked at all its rows
                reject_unread_keys([cfg], context.overrides.task)
            check_parts(cfg)
            check_writable(cfg.out)
            cells.append(cfg)
            if not skip.report_if_finished(cfg):
                with job_scope(cfg.on_failure):
                    from fpn_ablate.runs.run import run  # takes seconds, which a job that must not begin does not have

                    run(cfg, 0 if single else context.job.num)
    finally:
        if single:
            publish(cells)


def _use_platform_start_method() -> None:
    """Start processes in the platform's way: joblib's launcher leaves loky's in its workers, where torch's loader fails."""
    if multiprocessing.get_start_method(allow_none=True) not in (None, *multiprocessing.get_all_start_methods()):
        multiprocessing.set_start_method(None, force=True)


class NotStarted(Exception):
    """Another row of the sweep has failed, and on_failure=stop."""


class WorkerKilled(Exception):
    """The process of a job was killed; as a rule by the system, for want of memory."""


class Interrupted(Exception):
    """`signals.Stopped` as a worker of joblib reports it: the other workers may still finish their steps."""


@contextmanager
def job_scope(on_failure: str) -> Iterator[None]:
    """Run a job, unless no further job may begin; with on_failure=stop its failure stops the jobs that have not begun.

    Raises:
        NotStarted: on_failure=stop, and another row has failed; nothing was done.
        Stopped: a signal asked the process to stop; in a worker of joblib `Interrupted`.
    """
    stop_file = Path(os.environ[STOP]) if STOP in os.environ else None
    if stop_file and stop_file.exists():
        raise NotStarted(f"not started: on_failure=stop, and another row has failed ({stop_file.read_text('utf-8')})")
    try:
        signals.raise_if_stopped()
        with signals.reraise_as_stopped():
            yield
    except signals.Stopped as stop:
        _release_frames(stop)  # they hold the processes that load images
        if multiprocessing.parent_process():
            raise Interrupted("a signal asked for it") from None
        raise
    except Exception as error:
        # Hydra keeps the error until the sweep ends, and its frames would keep the row's network and data.
        _release_frames(error)
        if stop_file and on_failure == "stop":
            with suppress(UserError):
                save_text(stop_file, f"{type(error).__name__}: {error}")
        raise


class RetryingLauncher:
    """Wrap a Hydra launcher so that one crashed worker does not abort the batch.

    A crash loses the returns of all jobs of the batch. The first job that has not ended is then run alone, so that no job fails
    for its neighbour's use of memory; if its process is killed again, it has failed, and its record says so. All others are
    launched again, and find out themselves what is left to do. Failures are collected in `failed` and do not end the sweep
    unless on_failure=stop.
    """

    def __init__(self, launcher: Any, cells: Sequence[Config], stop_file: Path) -> None:
        self.launcher, self.cells, self.stop_file, self.failed = launcher, cells, stop_file, []
        self.stop = False  # on_failure=stop

    def launch(self, job_overrides: Sequence[Job], initial_job_idx: int) -> Sequence[JobReturn]:
        self.stop_file.unlink(missing_ok=True)
        pending, returns = dict(enumerate(job_overrides, start=initial_job_idx)), {}
        while pending:
            try:
                launched = self.launcher.launch(list(pending.values()), initial_job_idx=min(pending))
                returns |= zip(pending, launched, strict=True)
                break
            except BrokenProcessPool:
                signals.raise_if_stopped()
                # Workers take jobs in their order, so this is one of those that were running.
                number = next((number for number in pending if not has_ended(self.cells[number])), min(pending))
                returns[number] = self._run_alone(pending.pop(number), number)
                if self.stop and returns[number].status == JobStatus.FAILED:
                    break
        signals.raise_if_stopped()
        ordered = [returns[number] for number in sorted(returns)]
        return ordered if self.stop else [self._collect_failure(job_return) for job_return in ordered]

    def _run_alone(self, job: Job, number: int) -> JobReturn:
        log_line(f"a worker was killed: retrying {' '.join(job)} alone", sys.stderr)
        try:
            return self.launcher.launch([job], initial_job_idx=number)[0]
        except BrokenProcessPool:
            signals.raise_if_stopped()
        error = WorkerKilled("its process was killed, alone too; by the system, for want of memory?")
        mark_killed(self.cells[number], f"WorkerKilled: {error}")
        job_return = JobReturn(overrides=job, status=JobStatus.FAILED)
        job_return.return_value = error
        return job_return

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
            log_line(f"failed: {' '.join(job_return.overrides)}: {type(error).__name__}: {error}", sys.stderr)
        if self.failed:
            raise self.failed[0]._return_value


def _release_frames(error: BaseException | None) -> None:
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__

"""Run the jobs of a sweep, and keep the sweep going when a row fails, or another process works on it.

`run_job` is a job, in whatever process; `RetryingLauncher` wraps Hydra's launcher, in the process of the sweep. The state of a
job is the record of its run.
"""

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import RunMode
from omegaconf import DictConfig

from fpn_ablate.config.composition import cell_config
from fpn_ablate.config.schema import Config
from fpn_ablate.config.sources import sources as sources_of
from fpn_ablate.config.user_parts import folder_of
from fpn_ablate.runs import skip
from fpn_ablate.sweep.announce import announce_run
from fpn_ablate.sweep.checks import (
    HydraUserError,
    as_hydra_error,
    check_inputs,
    check_parts,
    check_writable,
    reject_unread_keys,
)
from fpn_ablate.sweep.objective import objective, objective_column
from fpn_ablate.sweep.publish import mark_killed, publish
from fpn_ablate.sweep.shared_sources import shared_sources
from fpn_ablate.tracking.progress import relay_lines
from fpn_ablate.utils import signals
from fpn_ablate.utils.console import log_line
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.files import save_text
from fpn_ablate.utils.gpus import claim_gpus
from fpn_ablate.utils.locks import Held, is_free
from fpn_ablate.utils.world import launched_rank

# Environment variables. STOP: a file of the sweep that holds the first failure, if on_failure=stop. SOURCES: a job carries out
# only what its row builds on.
STOP, SOURCES = "FPN_ABLATE_STOP", "FPN_ABLATE_SOURCES"
ONLY_SOURCES = f"+hydra.job.env_set.{SOURCES}=only"  # an override, since it reaches a job through any launcher
POLL = 1.0  # seconds between two looks at the locks of deferred jobs
Job = Sequence[str]  # a job's overrides


@dataclass(frozen=True)
class Deferred:
    """The value of a job that did nothing, since another process holds the lock `path`, which `task` needs."""

    path: str
    task: str


@signals.running_job()
def run_job(composed: DictConfig) -> Deferred | float | None:
    """Run one cell; Hydra calls this for each job, in any process. In our sweeps it waits for no other process.

    Return the value of the cell's objective, for sweepers that search; None if it is undefined.

    What is heavy is imported here, so that a mistyped key and a finished cell are reported at once.
    """
    _use_platform_start_method()
    signals.install_handlers()  # in a worker of joblib or a job of SLURM for good: its other jobs must not begin either
    context = HydraConfig.get()
    single = context.mode == RunMode.RUN
    if multiprocessing.parent_process():
        signals.end_with_parent()  # a sweep that is killed leaves no worker
        relay_lines()
    cells = []
    with as_hydra_error(exit_on_error=single):
        try:
            config_dir = folder_of(context.runtime.config_sources)
            cfg = cell_config(composed, context.runtime.choices, context.overrides.task, config_dir)
            if single:  # a sweep has looked at all its rows
                _reject_sweep_options(context.runtime.choices)
                reject_unread_keys([cfg], context.overrides.task)
            check_parts(cfg)
            check_writable(cfg.out)
            if cfg.objective:
                objective_column(cfg)
            finished = skip.report_if_finished(cfg)
            if single and not finished:
                check_inputs([cfg])
            cells.append(cfg)
            if finished:
                return objective(cfg, skip.finished_record(cfg))
            if single:
                announce_run(cfg, bare=not context.overrides.task)
            with job_scope(cfg.on_failure):
                # A sweeper that is not ours would not launch a deferred job again.
                return _run_or_defer(cfg, 0 if single else context.job.num, wait=STOP not in os.environ)
        finally:  # before an error is printed, which is the last thing to read
            if single and not signals.pending_signal():  # an interrupted run has nothing to add to its table
                publish(cells, single=True)


def _run_or_defer(cfg: Config, job: int, wait: bool) -> Deferred | float | None:
    """Run a cell, or only what it builds on. `job`: its position in the sweep."""
    if cfg.device != "cpu" and not launched_rank():  # torchrun and srun share the GPUs out themselves
        claim_gpus(cfg.gpus)
    from fpn_ablate.runs.run import run, run_sources  # takes seconds, which a job that must not begin does not have

    try:
        if SOURCES in os.environ:
            return run_sources(cfg, job)
        record = run(cfg, job, wait)
    except Held as held:
        return Deferred(str(held.path.resolve()), held.task)
    return objective(cfg, record)


def _reject_sweep_options(choices: Mapping[str, Any]) -> None:
    """Refuse a launcher or a sweeper that a single run does not use.

    Raises:
        UserError: one is chosen.
    """
    for group, default in (("hydra/launcher", "basic"), ("hydra/sweeper", "table")):
        if choices.get(group, default) != default:
            raise UserError(f"{group}={choices[group]} is for sweeps: add -m, or leave it out")


def _use_platform_start_method() -> None:
    """Start processes in the platform's way: joblib's launcher leaves loky's in its workers, where torch's loader fails."""
    if multiprocessing.get_start_method(allow_none=True) not in (None, *multiprocessing.get_all_start_methods()):
        multiprocessing.set_start_method(None, force=True)


class NotStarted(Exception):
    """Another row of the sweep has failed, and on_failure=stop."""


class WorkerKilled(Exception):
    """The process of a job was lost: killed, as a rule by the system for want of memory, cancelled, or past its limit."""


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
    """Wrap a Hydra launcher so that no job waits for another process, and no failure ends the batch.

    What several rows build on is made first, by jobs of its own. A job that needs a lock which another process holds returns
    `Deferred`, and is launched again behind all others, once that lock is free. Failures are collected in `failed` and do not
    end the sweep unless on_failure=stop.

    The wrapped launcher returns one JobReturn a job, in their order; one whose process was lost has failed with `WorkerKilled`.
    """

    def __init__(self, launcher: Any, cells: Mapping[Job, Config], stop_file: Path) -> None:
        self.launcher, self.cells, self.stop_file, self.failed = launcher, cells, stop_file, []
        self.returns: dict[tuple[str, ...], JobReturn] = {}  # of all jobs that have ended, by their overrides
        self.stop = False  # on_failure=stop
        self.in_turn = False  # the launcher runs one job after the other: each makes what the next ones build on

    def launch(self, job_overrides: Sequence[Job], initial_job_idx: int) -> Sequence[JobReturn]:
        self.stop_file.unlink(missing_ok=True)
        jobs, returns = dict(enumerate(job_overrides, start=initial_job_idx)), {}
        if not self.in_turn:
            sources = shared_sources({number: self.cells[tuple(job)] for number, job in jobs.items()})
            self._launch({number: [*jobs[number], ONLY_SOURCES] for number in sources})  # if one fails, its rows say why
        ready, deferred = jobs, {}
        while ready:
            launched = self._launch(ready)
            deferred |= {number: value for number in ready if isinstance(value := launched[number]._return_value, Deferred)}
            returns |= {number: job_return for number, job_return in launched.items() if number not in deferred}
            if self.stop and any(job_return.status == JobStatus.FAILED for job_return in returns.values()):
                break
            ready = {number: jobs[number] for number in _wait_for_any(deferred)}
            deferred = {number: value for number, value in deferred.items() if number not in ready}
        self.returns |= {tuple(jobs[number]): job_return for number, job_return in returns.items()}
        ordered = [returns[number] for number in sorted(returns)]
        return ordered if self.stop else [self._collect_failure(job_return) for job_return in ordered]

    def _launch(self, jobs: dict[int, Job]) -> dict[int, JobReturn]:
        """Launch jobs and return what each returned; the record of one whose process was lost says so."""
        if not jobs:
            return {}
        launched = self.launcher.launch(list(jobs.values()), initial_job_idx=min(jobs))
        signals.raise_if_stopped()
        returns = dict(zip(jobs, launched, strict=True))
        for number, job_return in returns.items():
            error = job_return._return_value
            if isinstance(error, WorkerKilled):
                cell = self.cells[tuple(override for override in jobs[number] if override != ONLY_SOURCES)]
                for cfg in (cell, *sources_of(cell).values()):
                    mark_killed(cfg, f"{type(error).__name__}: {error}")
        return returns

    def _collect_failure(self, job_return: JobReturn) -> JobReturn:
        """Move a failure to `failed` and return a completed job in its place: Hydra starts no batch after a failed one."""
        if job_return.status == JobStatus.FAILED:
            self.failed.append(job_return)
            return JobReturn(overrides=job_return.overrides, status=JobStatus.COMPLETED)
        return job_return

    def raise_first_failure(self) -> None:
        """Print each failure once, with its rows. Raise the first of this process, with its traceback, or exit with code 1.

        An error of another process has no traceback here; its notes name the file that has one.
        """
        rows: dict[str, list[str]] = {}
        shared = set.intersection(*(set(job_return.overrides) for job_return in self.failed)) if len(self.failed) > 1 else set()
        for job_return in self.failed:
            error = job_return._return_value
            text = str(error) if isinstance(error, HydraUserError) else f"{type(error).__name__}: {error}"
            own = [override for override in job_return.overrides if override not in shared] or job_return.overrides
            rows.setdefault(text, []).append(" ".join(override.lstrip("+") for override in own))
        for text, failed_rows in rows.items():
            log_line(f"failed: {'; '.join(dict.fromkeys(failed_rows))}: {text}", sys.stderr)
        errors = [job_return._return_value for job_return in self.failed]
        for error in errors:
            if error.__traceback__ and not isinstance(error, HydraUserError):
                raise error
        for note in dict.fromkeys(note for error in errors for note in getattr(error, "__notes__", ())):
            log_line(note, sys.stderr)
        if errors:
            raise SystemExit(1)


def failed_return(job: Job, error: Exception) -> JobReturn:
    """Return what a launcher returns for a job that failed outside of Hydra's own handling of errors."""
    job_return = JobReturn(overrides=job, status=JobStatus.FAILED)
    job_return.return_value = error
    return job_return


def _wait_for_any(deferred: Mapping[int, Deferred]) -> list[int]:
    """Wait until one of the locks that deferred jobs need is free, and return the numbers of the jobs whose lock is."""
    if deferred:
        others = f" (and {len(deferred) - 1} more)" if len(deferred) > 1 else ""
        task = next(iter(deferred.values())).task
        log_line(f"{task}{others}: another row or process is working on it; waiting", sys.stderr)
    while deferred:
        if free := [number for number, job in deferred.items() if is_free(Path(job.path))]:
            return free
        time.sleep(POLL)
        signals.raise_if_stopped()  # the handler does not raise while idle workers exist
    return []


def _release_frames(error: BaseException | None) -> None:
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__

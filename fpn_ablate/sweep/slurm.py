"""Run the rows of a sweep as jobs of SLURM, which submitit submits.

submitit alone ends a sweep at the first job that is killed, waits for ever where SLURM keeps no accounts, and requeues a job
before its run has saved a checkpoint. Here a lost job costs its own row, and jobs do not need the process that submitted them.
"""

import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher

from fpn_ablate.config.schema import Config
from fpn_ablate.runs import skip
from fpn_ablate.sweep.checks import as_hydra_error
from fpn_ablate.sweep.jobs import ONLY_SOURCES, Deferred, Job, WorkerKilled, failed_return
from fpn_ablate.utils import signals
from fpn_ablate.utils.console import log_line
from fpn_ablate.utils.errors import UserError, first_line
from fpn_ablate.utils.hashing import digest

if TYPE_CHECKING:
    from submitit.core.utils import JobPaths

POLL = 10  # seconds between two looks at the queue
GRACE = 60  # seconds for which a job may be missing from the queue: NFS may hide its result for that long
# States that a job does not leave by itself.
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"}
ENDED |= {"PREEMPTED", "REVOKED", "TIMEOUT"}
# A job that is preempted while it loads, before it has a handler, would fail. Ignoring the signal, it is killed and requeued.
PYTHON = f"""sh -c 'trap "" TERM USR2; exec "$0" "$@"' {shlex.quote(sys.executable)}"""
INHERITED = "FPN_ABLATE"  # environment variables that a job gets even if SLURM hands over none


@dataclass
class QueuedJob:
    """A job as submitit pickles it, for an interpreter that knows nothing else of the sweep's process."""

    launcher: Launcher  # of hydra-submitit-launcher, which composes the job's configuration
    environment: dict[str, str]

    def __call__(self, *arguments: Any) -> JobReturn:
        """Run the job. At SIGTERM and SIGUSR2 it saves a checkpoint, and is requeued unless SLURM is ending it already."""
        os.environ |= self.environment
        requeue = signal.getsignal(signal.SIGUSR2)  # submitit's handler, which counts the limits that the job has reached
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, signal.SIG_DFL)
        signals.install_handlers()
        job = os.environ["SLURM_JOB_ID"]
        try:
            job_return = self.launcher(*arguments)
        except signals.Stopped as stop:
            # A preempted job in its time of grace is running. One that scancel ends is not, nor one that SLURM requeues itself.
            queue, limit = read_queue(f"--jobs={job}"), stop.code == 128 + signal.SIGUSR2
            if (queue is None and limit) or "RUNNING" in [state for state, _ in (queue or {}).values()]:
                requeue(stop.code - 128, None)
            raise SystemExit(stop.code) from None
        # The sweep's process may be gone: the job itself comes back, after two minutes, and holds no node until then.
        if isinstance(job_return._return_value, Deferred) and not subprocess.run(["scontrol", "requeue", job]).returncode:
            raise SystemExit
        return job_return

    def checkpoint(self, *arguments: Any) -> Any:
        """Return what submitit requeues: the same again, since a run finds its checkpoint itself."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, *arguments)


class SlurmLauncher:
    """Submit the jobs of a batch as an array of SLURM, and wait for them unless `detach`.

    A job is named after row, seed, table and a digest of what was asked. One that an earlier command has put into the queue is
    not submitted again.

    Raises:
        UserError: this machine has no SLURM.
    """

    def __init__(self, launcher: Any, cells: Mapping[Job, Config]) -> None:
        self.launcher, self.cells = launcher, cells  # hydra-submitit-launcher's, and the sweep's cells by their jobs
        self.options = dict(launcher.params)
        self.detach = self.options.pop("detach", False)
        self.folder = self.options.pop("submitit_folder")
        if not all(map(shutil.which, ("sbatch", "srun", "squeue", "scontrol"))):
            raise UserError("hydra/launcher=slurm: this machine has no sbatch; start the sweep on a login node of the cluster")
        asked = [self.options.get(key) for key in ("gpus_per_node", "gpus_per_task")]
        self.has_gpus = any(asked) or "gpu" in str(self.options.get("gres"))
        self.earlier: list[str] = []  # ids of the jobs of earlier batches

    def launch(self, job_overrides: Sequence[Job], initial_job_idx: int) -> Sequence[JobReturn]:
        """Return what each job returned: a failure for one that SLURM ended. With `detach`, return at once."""
        names = [self._name(job) for job in job_overrides]
        queue = {name: number for number, (state, name) in (read_queue() or {}).items() if state not in ENDED}
        new = [index for index, name in enumerate(names) if name not in queue and name not in names[:index]]
        if new:
            with as_hydra_error(exit_on_error=True):
                submitted = self._submit([(job_overrides[index], initial_job_idx + index) for index in new])
            for index, number in zip(new, submitted, strict=True):
                queue[names[index]] = number
                subprocess.run(["scontrol", "update", f"JobId={number}", f"JobName={names[index]}"], check=False)
        numbers = [queue[name] for name in names]
        submitted_names = [names[index] for index in new]
        for name in dict.fromkeys(names):
            log_line(f"SLURM job {queue[name]}: {name}{'' if name in submitted_names else ', of an earlier command'}")
        self.earlier += numbers
        if self.detach:
            runs = self.launcher.config.hydra.sweep.dir
            log_line(f"detached: python -m fpn_ablate report {runs} makes the tables of what is finished")
            return [JobReturn(overrides=job, status=JobStatus.COMPLETED) for job in job_overrides]
        try:
            return self._wait(job_overrides, numbers)
        except KeyboardInterrupt:
            log_line(f"jobs go on: the same command waits for them again; scancel {' '.join(numbers)} ends them", sys.stderr)
            raise

    def _cell(self, job: Job) -> Config:
        return self.cells[tuple(override for override in job if override != ONLY_SOURCES)]

    def _name(self, job: Job) -> str:
        cfg, what = self._cell(job), "sources-of-" if ONLY_SOURCES in job else ""
        asked = digest([list(job), skip.request_digest(cfg)])
        return re.sub(r"[^\w.+=-]", "_", f"{what}{cfg.row}-seed{cfg.seed}-{cfg.table}-{asked[:8]}")

    def _submit(self, jobs: Sequence[tuple[Job, int]]) -> list[str]:
        """Submit jobs, each with its position in the sweep, and return their ids.

        Raises:
            UserError: submitit does not know an option, or SLURM refuses the jobs.
        """
        import submitit

        cells = [self._cell(job) for job, _ in jobs]
        options = {"cpus_per_task": max(cfg.gpus * max(cfg.threads or 1, 1 + cfg.workers) for cfg in cells)}
        options |= {key: value for key, value in self.options.items() if value is not None}
        if self.detach and self.earlier:  # such as what several rows build on
            options["dependency"] = f"afterany:{':'.join(self.earlier)}"
        environment = {name: value for name, value in os.environ.items() if name.startswith(INHERITED)}
        task, state = QueuedJob(self.launcher, environment), Singleton.get_state()
        arguments = [(list(job), "hydra.sweep.dir", number, f"job_id_for_{number}", state) for job, number in jobs]
        try:
            first = {"slurm_max_num_timeout": options.pop("max_num_timeout", 0), "slurm_python": PYTHON}
            executor = submitit.AutoExecutor(self.folder, "slurm", **first)
            executor.update_parameters(**{f"slurm_{key}": value for key, value in options.items()})
            return [job.job_id for job in executor.map_array(task, *zip(*arguments, strict=True))]
        except (RuntimeError, NameError, ValueError, OSError) as error:
            raise UserError(
                f"SLURM takes no job: {first_line(error)}; hydra.launcher.KEY=VALUE sets options of sbatch"
            ) from None

    def _wait(self, jobs: Sequence[Job], numbers: Sequence[str]) -> list[JobReturn]:
        """Wait for each job's result, or until it has left the queue without one."""
        from submitit.core.utils import JobPaths

        paths = [JobPaths(self.folder, number) for number in numbers]
        returns: dict[int, JobReturn] = {}
        in_queue = dict.fromkeys(range(len(jobs)), time.monotonic())  # when a job was seen there last
        while len(returns) < len(jobs):
            queue = read_queue()  # before the results, since a job writes its own before it ends
            for index in in_queue.keys() - returns.keys():
                state, _ = (queue or {}).get(numbers[index], ("gone", ""))
                if paths[index].result_pickle.exists():
                    returns[index] = _read_result(jobs[index], paths[index])
                elif queue is None or state not in ("gone", *ENDED):
                    in_queue[index] = time.monotonic()
                elif time.monotonic() - in_queue[index] > GRACE:
                    returns[index] = _killed(jobs[index], paths[index], state)
            time.sleep(POLL if len(returns) < len(jobs) else 0)
            signals.raise_if_stopped()  # the handler does not raise while other workers exist
        return [returns[index] for index in range(len(jobs))]


def read_queue(*options: str) -> dict[str, tuple[str, str]] | None:
    """Return state and name of the user's jobs by their ids, for some minutes after their end too; None without an answer."""
    command = ["squeue", "--noheader", "--array", "--states=all", f"--user={os.getuid()}", "--format=%i|%T|%j", *options]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        return None
    jobs = (line.strip().split("|", 2) for line in answer.stdout.splitlines())
    return {number: (state, name) for number, state, name in jobs}


def _read_result(job: Job, paths: "JobPaths") -> JobReturn:
    """Read what a job returned, or why it did not: its node lacks a package, or it has reached its last limit."""
    try:
        outcome, result = pickle.loads(paths.result_pickle.read_bytes())
    except Exception as error:  # of a class that this process cannot import
        outcome, result = "error", f"{type(error).__name__}: {error}"
    return result if outcome == "success" else _killed(job, paths, result.strip().splitlines()[-1])


def _killed(job: Job, paths: "JobPaths", reason: str) -> JobReturn:
    error = WorkerKilled(f"SLURM job {paths.job_id} ended without a result: {reason}; its log: {paths.stdout}")
    return failed_return(job, error)

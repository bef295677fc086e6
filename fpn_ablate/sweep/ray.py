"""Run the jobs of a sweep as tasks of Ray, on this machine or on a cluster.

Hydra's own launcher for Ray loses all returns of a batch when one process is killed, leaves the jobs on a cluster without the
sweep's environment and folder, and needs an old cloudpickle. `hydra.launcher.ray` has the same keys.
"""

import os
import re
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from fpn_ablate.sweep.checks import as_hydra_error
from fpn_ablate.sweep.jobs import WorkerKilled, failed_return
from fpn_ablate.utils.errors import UserError, first_line

# Environment variables that a job reads; the nodes of a cluster have those of `ray start`. Ray shows them to all its users.
HANDED_OVER = ("FPN_ABLATE_", "PYTHONPATH", "OMP_", "MKL_", "WANDB_", "TORCH_", "XDG_CACHE_HOME", "HF_", "HYDRA_FULL_ERROR")
SECRETS = ("_KEY", "_TOKEN")  # ends of names that are not handed over


class RayLauncher(Launcher):
    """Launch each job as a task of Ray: `hydra/launcher=ray`."""

    def __init__(self, ray: DictConfig) -> None:
        self.settings: dict[str, Any] = OmegaConf.to_container(ray, resolve=True)  # type: ignore[assignment]

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config
        with as_hydra_error(exit_on_error=True):
            _connect(self.settings["init"], self.settings["remote"].get("max_retries", 1))

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        import ray

        # A process a job: one that is used again keeps the GPU that its first job was given.
        task, state = ray.remote(max_calls=1)(_run_in).options(**self._options()), Singleton.get_state()
        references = [
            task.remote(os.getcwd(), number, list(job), self.hydra_context, self.config, self.task_function, state)
            for number, job in enumerate(job_overrides, start=initial_job_idx)
        ]
        try:
            return [_wait_for(reference, job) for reference, job in zip(references, job_overrides, strict=True)]
        except KeyboardInterrupt:
            for reference in references:
                ray.cancel(reference)  # Ctrl-C in the job: it finishes its step and saves a checkpoint
            ray.wait(references, num_returns=len(references))
            raise

    def _options(self) -> dict[str, Any]:
        import ray

        options = dict(self.settings["remote"])
        if options.get("num_gpus") is None:
            has_gpus = self.config.device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
            options["num_gpus"] = self.config.gpus if has_gpus else 0
        return _with_environment(options)


def _with_environment(options: dict[str, Any]) -> dict[str, Any]:
    """Add the variables of HANDED_OVER to arguments of `ray.init` or options of a task, where those given there count more."""
    names = [name for name in os.environ if name.startswith(HANDED_OVER) and not name.endswith(SECRETS)]
    environment = {name: os.environ[name] for name in names}
    runtime = options.get("runtime_env") or {}
    return options | {"runtime_env": runtime | {"env_vars": environment | runtime.get("env_vars", {})}}


def _connect(settings: dict[str, Any], retries: int) -> None:
    """Start Ray, or connect to a cluster.

    Raises:
        UserError: Ray is not installed, or there is no such cluster.
    """
    # Ray starts a task without end that it kills for want of memory; max_retries does not count there. It reads this once.
    os.environ.setdefault("RAY_task_oom_retries", str(retries))
    try:
        import ray
    except ImportError:
        raise UserError('hydra/launcher=ray: Ray is not installed; pip install "fpn-ablate[ray]"') from None
    _check_answers(settings.get("address"))
    handler = signal.getsignal(signal.SIGTERM)
    try:
        if not ray.is_initialized():
            ray.init(**_with_environment(settings))  # ray:// reads what is sent in a process that needs PYTHONPATH, too
    except (ConnectionError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(f"hydra.launcher.ray.init: {error}") from None
    finally:
        signal.signal(signal.SIGTERM, handler)  # Ray's would end the sweep without a checkpoint


def _check_answers(address: str | None) -> None:
    """Check that a server is at `HOST:PORT` or `ray://HOST:PORT`: Ray itself would try for minutes.

    Raises:
        UserError: nothing answers.
    """
    if match := re.fullmatch(r"(?:ray://)?([^:/]+):(\d+)", address or ""):
        try:
            socket.create_connection((match[1], int(match[2])), timeout=10).close()
        except (OSError, OverflowError) as error:
            raise UserError(f"hydra.launcher.ray.init.address={address}: nothing answers there ({error})") from None


def _run_in(folder: str, number: int, job: list[str], *context: Any) -> JobReturn:
    """Run a job in the folder of the sweep, from which relative paths count; called in a process of Ray's."""
    if not Path(folder).is_dir():
        error = UserError(f"{folder}: {os.uname().nodename} has no such folder; start the sweep in one that all nodes share")
        return failed_return(job, error)
    from hydra_plugins.hydra_joblib_launcher._core import execute_job

    os.chdir(folder)
    return execute_job(number, job, *context)


def _wait_for(reference: Any, job: Sequence[str]) -> JobReturn:
    """Wait for a task; if its process was killed, its return is a failed one."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:  # raised outside the job, as by its configuration
        return failed_return(job, error.as_instanceof_cause())
    except ray.exceptions.RayError as error:
        return failed_return(job, WorkerKilled(f"Ray lost its process: {first_line(error)}"))

"""In place of Ray: a task is pickled and run by a fresh interpreter, in another folder and without this environment.

Run as a script, it is that interpreter: `python stub_ray.py FILE` replaces the pickled call by the pickled result.
"""

import os
import pickle
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any


class RayError(Exception):
    pass


class RayTaskError(RayError):
    def as_instanceof_cause(self) -> BaseException | None:
        return self.__cause__


class StubRay(ModuleType):
    """The part of Ray that the launcher uses. `options` are those of each task, `cancelled` the tasks that were cancelled."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self, gpus: int = 0) -> None:
        super().__init__("ray")
        self.gpus, self.settings, self.options, self.cancelled, self.waited = gpus, None, [], [], []

    def is_initialized(self) -> bool:
        return self.settings is not None

    def init(self, **settings: Any) -> None:
        self.settings = settings
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))  # as Ray does

    def cluster_resources(self) -> dict[str, float]:
        return {"GPU": self.gpus} if self.gpus else {}

    def remote(self, **settings: Any) -> Any:
        """Return a decorator, as Ray does where it is given settings."""
        self.task_settings = settings
        return self._task

    def _task(self, function: Any) -> Any:
        def options(**options: Any) -> Any:
            def submit(*arguments: Any) -> tuple:
                self.options.append(options)
                return function, arguments, options

            return SimpleNamespace(remote=submit)

        return SimpleNamespace(options=options)

    def get(self, task: tuple) -> Any:
        import cloudpickle

        function, arguments, options = task
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "task.pickle")
            file.write_bytes(cloudpickle.dumps((function, arguments)))
            environment = {"PATH": os.environ["PATH"], **options["runtime_env"]["env_vars"]}
            process = subprocess.run([sys.executable, __file__, str(file)], cwd=folder, env=environment)
            if process.returncode < 0:
                raise RayError(f"The worker died:\nsignal {-process.returncode}")
            if process.returncode:
                raise RayTaskError from RuntimeError("outside the job")
            return pickle.loads(file.read_bytes())

    def cancel(self, task: tuple) -> None:
        self.cancelled.append(task)

    def wait(self, tasks: list[tuple], num_returns: int) -> None:
        self.waited = [tasks, num_returns]


if __name__ == "__main__":
    function, arguments = pickle.loads(Path(sys.argv[1]).read_bytes())
    result = function(*arguments)
    import cloudpickle

    Path(sys.argv[1]).write_bytes(cloudpickle.dumps(result))

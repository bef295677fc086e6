"""Write to a file all that a launcher sends to a job's process, or read it: `python pickled_job.py write|read FILE [DIR]`."""

import pickle
import sys
from pathlib import Path
from typing import Any


def write(file: Path, *config_dir: str) -> None:
    """Start a sweep of two rows whose launcher pickles a job as submitit's and Ray's do, and runs none."""
    import cloudpickle
    from hydra.core.plugins import Plugins
    from hydra.core.singleton import Singleton

    from fpn_ablate.cli.main import main
    from fpn_ablate.sweep.plugin import register

    def launch(self: Any, job_overrides: Any, initial_job_idx: int) -> list:
        content = {name: getattr(self, name) for name in ("config", "hydra_context", "task_function")}
        file.write_bytes(cloudpickle.dumps([content, Singleton.get_state()]))
        raise KeyboardInterrupt

    register()  # Hydra loads its own plugins anew when it looks for ours
    Plugins.instance().class_name_to_class["hydra._internal.core_plugins.basic_launcher.BasicLauncher"].launch = launch
    folder = [f"--config-dir={name}" for name in config_dir]
    assert main(["-m", "ablation=fpn,c4", "recipe=smoke", "jobs=1", f"out={file.parent / 'results'}", *folder]) == 130


def read(file: Path) -> None:
    """Compose a job's configuration from the file, as its process would before it calls the job; print what it is."""
    content, state = pickle.loads(file.read_bytes())
    from hydra.core.singleton import Singleton

    Singleton.set_state(state)
    composed = content["hydra_context"].config_loader.load_sweep_config(content["config"], ["ablation=c4", "recipe=smoke"])
    from fpn_ablate.config.user_parts import folder_of

    config_dir = folder_of(composed.hydra.runtime.config_sources)
    print(content["task_function"].__name__, composed.neck.name, "torch" in sys.modules, config_dir)


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])

"""Make the sweeper, and what conf/config.yaml refers to, known to Hydra."""

import sys
from importlib import import_module
from pathlib import Path

from hydra.core.plugins import Plugins

from fpn_ablate.config import composition

PLUGINS = Path(__file__).with_name("plugins")


def register() -> None:
    """Put the sweeper on Hydra's path; you can call it as often as you like."""
    if str(PLUGINS) not in sys.path:
        sys.path.append(str(PLUGINS))
    composition.register()
    # Hydra looks for plugins once in a process: by name, where a configuration was composed before this call.
    for module, name in (("sweeper", "TableSweeper"), ("optuna", "OptunaSweeper"), ("ray", "RayLauncher")):
        Plugins.instance().register(getattr(import_module(f"hydra_plugins.fpn_ablate_{module}"), name))

"""Hydra's own sweeper, which first looks at all cells together and, when the sweep ends, prints what is on disk.

Hydra takes plugins from the namespace `hydra_plugins` alone; `fpn_ablate.__main__` puts this folder on the path.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from fpn_ablate import jobs, plan, stopping
from fpn_ablate.schema import Config
from fpn_ablate.sinks import CELLS
from fpn_ablate.sweep import (
    announce,
    cell_config,
    mark_killed,
    publish,
    refusal,
    refuse_twins,
    refuse_unwritable,
    without_hydra,
)


class Lean(Callback):
    """Hydra keeps two copies of a job's configuration, some 150 KiB, until the sweep ends. Nothing asks for them."""

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        job_return.cfg = job_return.hydra_cfg = None


class TableSweeper(BasicSweeper):
    """BasicSweeper with two additions: all jobs are validated before the first starts, and the tables come at the end."""

    def __init__(self, max_batch_size: int | None = None, params: dict[str, str] | None = None) -> None:
        super().__init__(max_batch_size=max_batch_size, params=params)
        self.cells: list[Config] = []

    def setup(self, **arguments: Any) -> None:
        super().setup(**arguments)
        folder = plan.own(Path(self.config.out, "runs")).with_suffix(".jobs")
        self.launcher = jobs.Steadfast(self.launcher, folder, lambda number, error: mark_killed(self.cells[number], error))

    def sweep(self, arguments: list[str]) -> Any:
        with refusal():
            refuse_unwritable(self.config.out)  # before Hydra writes its own file there
        os.environ[jobs.FOLDER], os.environ[jobs.SWEEP] = str(self.launcher.folder), str(os.getpid())
        try:
            with stopping.meant():
                returns = super().sweep(arguments)
                self.launcher.tell()
            return returns
        finally:
            del os.environ[jobs.FOLDER], os.environ[jobs.SWEEP]
            publish(self.cells)

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        assert self.hydra_context is not None and self.config is not None
        cells = []
        for overrides in batch:
            composed = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
            context = composed.hydra
            with refusal():
                cells.append(cell_config(without_hydra(composed), context.runtime.choices, context.overrides.task))
        refuse_twins(cells)
        self.launcher.stop = cells[0].on_failure == "stop"
        self.cells += cells
        os.environ[CELLS] = str(len(self.cells))
        announce(self.cells)

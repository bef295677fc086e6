"""Hydra's basic sweeper, which first checks all cells together, skips finished ones, and publishes the tables at its end."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra_plugins.hydra_joblib_launcher.joblib_launcher import JoblibLauncher
from omegaconf import DictConfig

from fpn_ablate.config.composition import cell_config, without_hydra
from fpn_ablate.config.overrides import add_if_missing
from fpn_ablate.config.schema import Config
from fpn_ablate.config.user_parts import folder_of
from fpn_ablate.runs import skip
from fpn_ablate.store import plan
from fpn_ablate.sweep import jobs
from fpn_ablate.sweep.checks import (
    as_hydra_error,
    check_inputs,
    check_launcher,
    check_parts,
    check_writable,
    reject_duplicate_rows,
    reject_unfair_rows,
    reject_unread_keys,
)
from fpn_ablate.sweep.local import LocalLauncher, rows_at_once
from fpn_ablate.sweep.publish import check_definitions, other_sweeps, publish, start_progress
from fpn_ablate.sweep.slurm import SlurmLauncher
from fpn_ablate.tracking.progress import AT_ONCE, STEPS
from fpn_ablate.utils import signals
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.world import launched_rank


class DropJobConfigs(Callback):
    """Drop the two copies of a job's configuration, some 150 KiB, that Hydra keeps until the sweep ends."""

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        job_return.cfg = job_return.hydra_cfg = None


class NoteOtherSweeps(Callback):
    """Note the start of a sweep by a sweeper that is not ours, whose tables `publish_other_sweeps` makes."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if not config.hydra.sweeper._target_.startswith("hydra_plugins.fpn_ablate_"):
            other_sweeps.append((config.out, time.time()))


class TableSweeper(BasicSweeper):
    """Hydra's BasicSweeper with three additions: a batch is validated before its first job starts, finished cells are skipped,
    and the tables are published at the end."""

    def __init__(self, max_batch_size: int | None = None, params: dict[str, str] | None = None) -> None:
        super().__init__(max_batch_size=max_batch_size, params=params)
        self.local: LocalLauncher | None = None  # unless Hydra's configuration names another launcher than basic and joblib
        self.n_jobs = -1  # of joblib's
        self.cells: list[Config] = []
        self.launched: dict[jobs.Job, Config] = {}  # by the job's overrides
        self.first_overrides: list[str] = []  # of each job; those of the command line count more

    def setup(self, **arguments: Any) -> None:
        with as_hydra_error(exit_on_error=True):
            check_launcher(arguments["config"].hydra.launcher._target_)
        super().setup(**arguments)
        if isinstance(self.launcher, BasicLauncher | JoblibLauncher):  # a process that is killed costs joblib's all their jobs
            self.n_jobs = getattr(self.launcher, "joblib", {}).get("n_jobs", -1)
            self.local = self.launcher = LocalLauncher(arguments)
        elif type(self.launcher).__name__ == "SlurmLauncher":
            with as_hydra_error(exit_on_error=True):
                self.launcher = SlurmLauncher(self.launcher, self.launched)
            # The host on which the sweep is started need not have the GPU that each job gets.
            self.first_overrides = ["device=cuda"] if self.launcher.has_gpus and self.config.device == "auto" else []
        stop_file = plan.plan_file(Path(self.config.out, "runs")).with_suffix(".stop")
        self.launcher = jobs.RetryingLauncher(self.launcher, self.launched, stop_file)

    def sweep(self, arguments: list[str]) -> Any:
        with as_hydra_error(exit_on_error=True):
            if launched_rank():
                raise UserError(
                    "torchrun starts the processes of one row: leave out -m, or sweep without torchrun, with gpus=N"
                )
            check_writable(self.config.out)  # before Hydra writes its own file there
        os.environ[jobs.STOP] = str(self.launcher.stop_file)
        try:
            with signals.reraise_as_stopped():
                returns = super().sweep(arguments)
        finally:
            del os.environ[jobs.STOP]
            self.publish()
        self.launcher.raise_first_failure()  # behind the tables: the last thing to read
        return returns

    def publish(self) -> None:
        """Publish the tables of all cells."""
        publish(self.cells)

    def _parse_config(self) -> list[str]:
        """Return the table's `hydra.sweeper.params` as overrides, to which those of the command line come."""
        return [*self.first_overrides, *(add_if_missing(param) for param in super()._parse_config())]

    def split_arguments(self, overrides: list[Override], max_batch_size: int | None) -> list[list[list[str]]]:
        """Divide the combinations of all values into batches, as Hydra's sweeper does; an interval has no combinations."""
        with as_hydra_error(exit_on_error=True):
            for override in overrides:
                if override.is_interval_sweep():
                    text = override.input_line.lstrip("+")
                    raise UserError(f"{text}: hydra/sweeper=optuna searches intervals; without it give values, as KEY=A,B")
        return super().split_arguments(overrides, max_batch_size)

    def is_done(self) -> bool:
        """Return True if no batch has anything left to do; else validate the next one and take its finished cells out.

        A launcher is not given finished cells: that saves a process, and the process loading torch.
        """
        while not super().is_done():
            batch = self.overrides[self.batch_index]
            cells = self._validated(batch)
            pending = [(job, cfg) for job, cfg in zip(batch, cells, strict=True) if not skip.report_if_finished(cfg)]
            self.overrides[self.batch_index] = [job for job, _ in pending]
            if pending and self.local:
                with as_hydra_error(exit_on_error=True):
                    check_inputs([cfg for _, cfg in pending])
            self.cells += cells  # what is refused has no tables
            if pending:
                if self.local:
                    self.local.jobs = rows_at_once([cfg for _, cfg in pending], self.n_jobs)
                    self.launcher.in_turn = self.local.jobs == 1
                    os.environ[AT_ONCE] = str(self.local.jobs)
                self.launched |= {tuple(job): cfg for job, cfg in pending}
                os.environ[STEPS] = ",".join(str(cfg.steps) for cfg in self.launched.values())
                start_progress(self.cells, [cfg for _, cfg in pending], self.local.jobs if self.local else None)
                return False
            self.batch_index += 1
        return True

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Do nothing: `is_done` has validated the batch."""

    def _validated(self, batch: Sequence[Sequence[str]]) -> list[Config]:
        assert self.hydra_context is not None and self.config is not None
        cells, given = [], []
        with as_hydra_error(exit_on_error=True):
            for overrides in batch:
                composed = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
                context = composed.hydra
                config_dir = folder_of(context.runtime.config_sources)
                cfg = cell_config(without_hydra(composed), context.runtime.choices, context.overrides.task, config_dir)
                check_parts(cfg)
                cells.append(cfg)
                given += context.overrides.task
            reject_unread_keys(cells, given)
            reject_duplicate_rows(cells)
            reject_unfair_rows(cells)
            check_definitions(cells)
        self.launcher.stop = cells[0].on_failure == "stop"
        return cells

"""Hydra's own sweeper, which first looks at all cells together and, when the sweep ends, prints what is on disk."""

import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.plugins import Plugins
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf

from fpn_ablate import report
from fpn_ablate.paths import ROOT
from fpn_ablate.report.tables import show
from fpn_ablate.errors import UserError
from fpn_ablate.schema import INCIDENTAL, Coco, Config, validate
from fpn_ablate.sinks import BEGAN, CELLS

# Overrides that do not make another recipe: what names the row, the data and the place has a name of its own.
_NAMED_ELSEWHERE = ("ablation", "seed", "recipe", "data", "data.root", "data.label", "task", "experiments")


def cell_config(composed: DictConfig, choices: dict[str, Any], overrides: Sequence[str]) -> Config:
    """What Hydra composed for a job, as a validated `Config` that knows its row's and its recipe's name.

    The row is called after its file in conf/ablation, and after the neck's switches that the command line adds to it; the
    recipe likewise: `fpn+upsample=bilinear`, `quick+steps=100`.
    """
    values = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(values, dict)
    values.pop("report", None)  # how a table looks is not the run's business
    values.pop("hydra", None)
    pairs = sorted(tuple(o.lstrip("+~").split("=", 1)) for o in overrides if "=" in o)
    row, recipe = [str(choices["ablation"])], [values["recipe"]["name"]]
    for key, value in pairs:
        group = key.split(".")[0]
        if group == "neck":
            row.append(f"{key.removeprefix('neck.')}={value}")
        elif key not in _NAMED_ELSEWHERE and group not in (*INCIDENTAL, "device", "hydra") and "/" not in key:
            recipe.append(f"{key.removeprefix('recipe.')}={value}")
    values["row"] = "+".join(row)
    values["recipe"]["name"] = "+".join(recipe)
    return validate(values)


def data_name(cfg: Config) -> str:
    """The data set's name in tables: `shapes`, or the label or folder of a COCO-format set."""
    return (cfg.data.label or Path(cfg.data.root).expanduser().resolve().name) if isinstance(cfg.data, Coco) else cfg.data.name


def publish(cells: Iterable[Config]) -> None:
    """Print and write the tables that these cells belong to, from all records on disk, finished or not."""
    cells = list(cells)
    for results in sorted({cfg.results for cfg in cells}):
        runs = Path(results, "runs")
        if not runs.is_dir():
            continue
        only = {(cfg.table, cfg.recipe.name, data_name(cfg)) for cfg in cells if cfg.results == results}
        for table in report.write(runs, results, only):
            show(table)
            print(f"written: {Path(results, 'tables', table.name)}.md .csv .tex, {Path(results, 'plots', table.name)}.png .svg")


class TableSweeper(BasicSweeper):
    """BasicSweeper with two additions: all jobs are validated before the first starts, and the tables come at the end."""

    # Hydra takes plugins by names in this namespace alone; `register` below gives it the class under that name.
    __module__ = "hydra_plugins.fpn_ablate"

    def __init__(self, max_batch_size: int | None = None, params: dict[str, str] | None = None) -> None:
        super().__init__(max_batch_size=max_batch_size, params=params)
        self.cells: list[Config] = []

    def sweep(self, arguments: list[str]) -> Any:
        try:
            return super().sweep(arguments)
        finally:
            publish(self.cells)

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        assert self.hydra_context is not None and self.config is not None
        cells = []
        for overrides in batch:
            composed = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
            with refusal():
                cells.append(cell_config(_without_hydra(composed), composed.hydra.runtime.choices, composed.hydra.overrides.task))
        _refuse_twins(cells)
        self.cells += cells
        os.environ[CELLS], os.environ[BEGAN] = str(len(self.cells)), str(time.time())


def _without_hydra(composed: DictConfig) -> DictConfig:
    return OmegaConf.masked_copy(composed, [key for key in composed if key != "hydra"])


def _refuse_twins(cells: Sequence[Config]) -> None:
    """Two rows that are the same configuration would fill two lines with one result."""
    seen: dict[str, Config] = {}
    for cfg in cells:
        twin = seen.setdefault(cfg.model_dump_json(exclude={*INCIDENTAL, "row"}), cfg)
        if twin.row != cfg.row:
            raise Refused(f"rows {twin.row} and {cfg.row} are the same configuration: take one of them out")


def register() -> None:
    """Make conf/config.yaml's sweeper and resolver known to Hydra."""
    OmegaConf.register_new_resolver("fpn_ablate_root", lambda: f"file://{ROOT}", replace=True)
    Plugins.instance().register(TableSweeper)


class Refused(ConfigCompositionException):
    """A UserError in Hydra's clothes: Hydra prints its message without a traceback."""


class refusal:  # noqa: N801  (reads as a word in a with statement)
    """Turns a UserError into `Refused`."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, UserError):
            raise Refused(str(error)) from None

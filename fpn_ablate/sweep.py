"""Between Hydra and a run: what a composed job means, and what is shown when jobs are over."""

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf

from fpn_ablate import report
from fpn_ablate.errors import UserError
from fpn_ablate.report.tables import show
from fpn_ablate.schema import INCIDENTAL, Coco, Config, validate

# Overrides that do not make another recipe: what names the row, the data and the place has a name of its own.
_NAMED_ELSEWHERE = ("ablation", "seed", "recipe", "data", "data.root", "data.label", "task", "experiments")
_PLACES = ("data.train.", "data.val.")


def cell_config(composed: DictConfig, choices: dict[str, Any], overrides: Sequence[str]) -> Config:
    """What Hydra composed for a job, as a validated `Config` that knows its row's and its recipe's name.

    The row is called after its file in conf/ablation, and after the neck's switches that the command line adds to it; the
    recipe likewise: `fpn+upsample=bilinear`, `quick+steps=100`.
    """
    values = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(values, dict)
    values.pop("report", None)  # how a table looks is not the run's business
    values.pop("hydra", None)
    # A path is named by its last part: records travel, folders do not.
    parts = (o.lstrip("+~").split("=", 1) for o in overrides if "=" in o)
    pairs = sorted((key, value.rpartition("/")[2]) for key, value in parts)
    row, recipe = [str(choices["ablation"])], [values["recipe"]["name"]]
    for key, value in pairs:
        group = key.split(".")[0]
        if group == "neck":
            row.append(f"{key.removeprefix('neck.')}={value}")
        elif not (key in _NAMED_ELSEWHERE or group in (*INCIDENTAL, "hydra") or "/" in key or key.startswith(_PLACES)):
            recipe.append(f"{key.removeprefix('recipe.')}={value}")
    values["row"] = "+".join(row)
    values["recipe"]["name"] = "+".join(recipe)
    return validate(values)


def data_name(cfg: Config) -> str:
    """The data set's name in tables: `shapes`, or the label or folder of a COCO-format set."""
    return (cfg.data.label or Path(cfg.data.root).expanduser().resolve().name) if isinstance(cfg.data, Coco) else cfg.data.name


def refuse_unwritable(out: str) -> None:
    """UserError if runs cannot be written below `out`."""
    try:
        runs = Path(out, "runs")
        runs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=runs):
            pass
    except OSError as error:
        raise UserError(f"out={out}: cannot be written to ({error.strerror}); give out=FOLDER") from None


def publish(cells: Iterable[Config]) -> None:
    """Print and write the tables that these cells belong to, from all records on disk, finished or not."""
    cells = list(cells)
    for out in sorted({cfg.out for cfg in cells}):
        runs = Path(out, "runs")
        if not runs.is_dir():
            continue
        only = {(cfg.table, cfg.recipe.name, data_name(cfg)) for cfg in cells if cfg.out == out}
        for table in report.write(runs, out, only):
            show(table)
            print(f"written: {Path(out, 'tables', table.name)}.md .csv .tex, {Path(out, 'plots', table.name)}.png .svg")


def without_hydra(composed: DictConfig) -> DictConfig:
    return OmegaConf.masked_copy(composed, [key for key in composed if key != "hydra"])


def refuse_twins(cells: Sequence[Config]) -> None:
    """Two rows that are the same configuration would fill two lines with one result."""
    seen: dict[str, Config] = {}
    for cfg in cells:
        twin = seen.setdefault(cfg.model_dump_json(exclude={*INCIDENTAL, "row"}), cfg)
        if twin.row != cfg.row:
            raise Refused(f"rows {twin.row} and {cfg.row} are the same configuration: take one of them out")


class Refused(ConfigCompositionException):
    """A UserError in Hydra's clothes: Hydra prints its message without a traceback."""


class refusal:
    """Turns a UserError into `Refused`."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, UserError):
            raise Refused(str(error)) from None

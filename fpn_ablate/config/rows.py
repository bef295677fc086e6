"""List and compose the rows of a sweep without running it."""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fpn_ablate.config.composition import DEFAULT_ROW, TABLES, compose, compose_jobs
from fpn_ablate.config.overrides import add_if_missing, check_yaml, choices, normalise
from fpn_ablate.config.schema import Config
from fpn_ablate.utils.errors import UserError, first_line
from fpn_ablate.utils.paths import CLAIMS, CONF, EXPERIMENTS


def compose_rows(overrides: Sequence[str] = (), config_dir: Path | None = None) -> list[Config]:
    """Compose one row for each combination of the values of keys that have several: `ablation=fpn,c4 backbone=vgg16,resnet18`.

    Without `ablation=`, they are what `+experiments=TABLE` sweeps over, for one seed; with a neck that is named, the row fpn
    with it; otherwise the rows of the task's table. Rows in `config_dir` come to those of a table.

    Raises:
        UserError: a key or a value does not exist.
    """
    typed = {_key(override): override for override in normalise(overrides)}  # the last of a key counts
    swept = {key: values for key, override in typed.items() if len(values := choices(override)) > 1}
    fixed = [override for key, override in typed.items() if key not in swept]
    names_neck = any(key.split(".")[0] == "neck" for key in typed)
    if "ablation" not in typed and ("experiments" in typed or not names_neck):
        params = _params_of_table(typed, fixed, config_dir)
        swept = {key: values for key, values in params.items() if key not in typed} | swept
    return compose_jobs(product(*swept.values()), fixed, config_dir)


def _params_of_table(typed: Mapping[str, str], fixed: Sequence[str], config_dir: Path | None) -> dict[str, list[str]]:
    """Return what the table that `experiments` names sweeps over, by key; without one, the rows of the task's table."""
    experiment, task = (typed.get(key, "").partition("=")[2] for key in ("experiments", "task"))
    table = experiment or compose(fixed, config_dir).table
    # Without a file, those of Table 1: others may not go with the task, as an image pyramid needs an RPN.
    params = _params(table, config_dir) or _params(TABLES["rpn"], None)
    rows = params.get("ablation", [f"ablation={DEFAULT_ROW}"])
    if not experiment:  # a row of the table may be of another task, as Faster R-CNN beside RetinaNet is
        params, rows = {}, [row for row in rows if not task or _task_of(row.partition("=")[2]) in (None, task)]
    rows += [f"ablation={file.stem}" for file in sorted((config_dir / "ablation").glob("*.yaml"))] if config_dir else []
    return params | {"ablation": list(dict.fromkeys(rows))}


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _params(table: str, config_dir: Path | None) -> dict[str, list[str]]:
    """Return the values that a table's file in experiments/ sweeps over, by key, but for the seeds."""
    for folder in ([config_dir / "experiments"] if config_dir else []) + [EXPERIMENTS]:
        file = folder / f"{table}.yaml"
        if file.exists() and file.name != CLAIMS:
            check_yaml(file)
            try:
                params = OmegaConf.select(OmegaConf.load(file), "hydra.sweeper.params") or {}
                if not isinstance(params, Mapping) or OmegaConf.is_list(params.get("ablation")):
                    raise ValueError("write KEY: VALUES, with the values as text, as ablation: 'c4,fpn'")
                return {key: choices(add_if_missing(f"{key}={values}")) for key, values in params.items() if key != "seed"}
            except (ValueError, AttributeError, HydraException, OmegaConfBaseException) as error:
                raise UserError(f"{file}: hydra.sweeper.params: {first_line(error)}") from None
    return {}


def _task_of(row: str) -> str | None:
    """Return the task that the file of a built-in row chooses; None if it goes with any."""
    file = CONF / "ablation" / f"{row}.yaml"
    defaults = OmegaConf.select(OmegaConf.load(file), "defaults") if file.exists() else None
    return next(
        (entry["override /task"] for entry in defaults or () if not isinstance(entry, str) and "override /task" in entry), None
    )

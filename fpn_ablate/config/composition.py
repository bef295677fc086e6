"""Compose configurations: from overrides, or from what Hydra composed for a job, to a validated `Config`."""

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import CompactHydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fpn_ablate.config import timm_source, user_parts
from fpn_ablate.config.factors import under
from fpn_ablate.config.overrides import check_files, normalise
from fpn_ablate.config.parts import UserPart
from fpn_ablate.config.schema import INCIDENTAL, Config
from fpn_ablate.config.validation import keys, unknown_key, validate
from fpn_ablate.utils.errors import UserError, first_line
from fpn_ablate.utils.paths import CONF, MODEL, ROOT

DEFAULT_ROW = "fpn"  # as conf/config.yaml has it
# The table of a task, or of a way to train Faster R-CNN, where none is named; others have a table of their own name.
TABLES = {
    "rpn": "table1_rpn",
    "fast_rcnn": "table2_fast_rcnn",
    "separate": "table3_faster_rcnn",
    "segment_proposals": "table6_segments",
    "masks_separate": "masks",
    "retinanet": "retinanet",
}
# Overrides that are no part of a recipe's name: rows, data and places have names of their own.
_NOT_IN_RECIPE_NAME = (
    *("ablation", "seed", "recipe", "data", "data.root", "data.label", "task", "task.training", "experiments", "mode"),
)
_PLACES = ("data.train.", "data.val.")
# Groups in which factors lie. Another data set or recipe is another table.
_MODEL = ("backbone", "neck", "rpn", "task", "image_pyramid")


def register() -> None:
    """Register the resolvers of conf/ and timm's configurations with Hydra; you can call it as often as you like."""
    timm_source.register()
    OmegaConf.register_new_resolver("fpn_ablate_root", lambda: f"file://{ROOT}", replace=True)
    OmegaConf.register_new_resolver("fpn_ablate_scaled", lambda width, factor: round(width * factor), replace=True)


def compose(overrides: Sequence[str] = (), config_dir: Path | None = None) -> Config:
    """Compose one row as the command line does: `compose(["ablation=c4", "recipe=smoke"])`.

    Args:
        overrides: key=value, as typed.
        config_dir: a further folder of configurations, as `--config-dir` names it.

    Raises:
        UserError: a key or a value does not exist.
    """
    return compose_jobs([()], normalise(overrides), config_dir)[0]


def compose_jobs(jobs: Iterable[Sequence[str]], overrides: Sequence[str], config_dir: Path | None) -> list[Config]:
    """Compose the jobs of a sweep, each a list of overrides to which come those of all jobs. All are `normalise`d.

    Raises:
        UserError: as `compose`.
    """
    register()
    jobs = list(jobs)
    check_files([*overrides, *(override for job in jobs for override in job)], config_dir)
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            if config_dir:  # as Hydra's own option puts it there
                search_path = GlobalHydra.instance().config_loader().get_search_path()
                search_path.prepend("command-line", f"file://{config_dir}", "schema")
            cells = []
            for job in jobs:
                every = [*overrides, *job]
                composed = hydra_compose("config", every)
                rows = [o.removeprefix("ablation=") for o in every if o.startswith("ablation=")] or [DEFAULT_ROW]
                try:
                    cells.append(cell_config(composed, {"ablation": rows[-1]}, every, config_dir))
                except UserError as error:
                    raise UserError(f"{' '.join(job)}: {error}" if len(jobs) > 1 else str(error)) from None
            return cells
    except (CompactHydraException, yaml.YAMLError) as error:
        raise UserError(error) from None
    except (TypeError, ValueError, LookupError) as error:  # Hydra and names, of values of a wrong type
        raise UserError(f"{shlex.join(overrides)}: cannot be read as key=value ({first_line(error)})") from None


def _row_name(choice: str) -> str:
    """Return the name of a row: without its folder if the file is ours, as masks/mlp."""
    return choice.rpartition("/")[2] if (CONF / "ablation" / f"{choice}.yaml").is_file() else choice


def cell_config(
    composed: DictConfig, choices: dict[str, Any], overrides: Sequence[str], config_dir: Path | None = None
) -> Config:
    """Validate what Hydra composed for a job, with the keys of the user's parts, and name its row and its recipe.

    A row is named after its file in conf/ablation and the factors that the overrides add to it, a recipe after all other
    overrides: `fpn+upsample=bilinear`, `quick+steps=100`. If a neck of the user's is chosen and no row, the row is named after
    that neck's file.

    Args:
        choices: the files that were chosen, by group.
        overrides: key=value, of the command line or of a sweep.
        config_dir: the folder of the user's parts.

    Raises:
        UserError: a key or a value is wrong; every problem is listed.
    """
    try:
        values = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:  # a `${...}` that leads nowhere, or to itself
        raise UserError(f"{error.full_key}: {first_line(error)}") from None
    assert isinstance(values, dict)
    values.pop("report", None)  # how a table looks is no part of a run
    values.pop("hydra", None)
    if not choices.get("ablation"):
        raise UserError("ablation: missing; give ablation=...")
    values |= {"row": "", "table": values.get("table") or ""}  # named below
    evaluates = values.get("mode") == "evaluate"
    if evaluates and "training" in (values.get("task") or ()):
        values["task"]["training"] = "joint"  # however it was trained, it is one network now, whose RPN makes its proposals
    cfg = validate(values, config_dir)
    for key, part in cfg.user_parts.items():
        user_parts.typed_arguments(part, key)
    _check_factors(cfg.factors, config_dir)
    # A table of files, or of one file's network under several switches.
    factors = (*cfg.factors, *(["weights"] if evaluates else []))

    # As in Hydra, the last value of a key that is given twice counts.
    last_values = dict(o.lstrip("+~").split("=", 1) for o in overrides if "=" in o)
    row, recipe = [_row_name(str(choices["ablation"]))], [cfg.recipe.name]
    if "ablation" not in last_values and "neck" in last_values and isinstance(cfg.neck, UserPart):
        row = [last_values.pop("neck")]
    for key, value in sorted((key, _name_of_value(key, value)) for key, value in last_values.items()):
        group = key.split(".")[0]
        if under(key, factors):
            row.append(f"{key.removeprefix('neck.').removeprefix('task.')}={value}")
        elif not (key in _NOT_IN_RECIPE_NAME or group in (*INCIDENTAL, "hydra") or "/" in key or key.startswith(_PLACES)):
            recipe.append(f"{key.removeprefix('recipe.')}={value}")
    kind = {"mask_rcnn": f"masks_{cfg.procedure}"}.get(cfg.task.name, cfg.procedure)
    kind = cfg.task.name if kind == "dense" else kind
    names = {
        "table": cfg.table or (f"evaluated_{cfg.task.name}" if evaluates else TABLES.get(kind, kind)),
        "row": "+".join(row),
        "factors": factors,
        "recipe": cfg.recipe.model_copy(update={"name": "+".join(recipe)}),
    }
    return cfg.model_copy(update=names)


def _name_of_value(key: str, value: str) -> str:
    """Return what an override's value adds to a name: of a path the last part, since records move between machines."""
    if key == "backbone":  # timm/resnet50 is no path, and not resnet50
        return value
    folder, _, name = value.rstrip("/").rpartition("/")
    if name == MODEL:  # every run's weights are called so
        name = folder.rpartition("/")[2] or name
    return {"True": "true", "False": "false"}.get(name, name)  # Hydra writes the jobs of a sweep so


def _check_factors(factors: Sequence[str], config_dir: Path | None) -> None:
    """Check the declared factors. With a `config_dir`, keys of a user's part may be among them.

    Raises:
        UserError: one is no key, or a key in which the rows of a table cannot differ.
    """
    for factor in factors:
        if factor not in set(keys()) and not (config_dir and under(factor, user_parts.POSITIONAL)):
            raise UserError(f"factors: {unknown_key(factor)}")
        if factor.split(".")[0] not in _MODEL:
            raise UserError(f"factors: {factor} cannot be one. Allowed: {', '.join(_MODEL)}, and the keys in them")


def without_hydra(composed: DictConfig) -> DictConfig:
    return OmegaConf.masked_copy(composed, [key for key in composed if key != "hydra"])

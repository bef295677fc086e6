"""What makes two runs the same: configuration that matters, data, starting weights, device and code. Never a time stamp."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fpn_ablate.config.schema import INCIDENTAL, Config, FastRCNNTask, RPNTask
from fpn_ablate.utils.hashing import code_version, digest

# Everything that can change a figure. Bookkeeping, reports, logging and the command line cannot.
CORE = (
    *("data", "evaluation/coco.py", "evaluation/recall.py", "structures", "utils/seeding.py", "weights"),
    *(f"engine/{name}.py" for name in ("evaluate", "fixed_proposals", "inputs", "optim", "pretrain", "procedures", "train")),
    *(f"model/{name}" for name in ("backbones", "detectors", "heads", "necks", "ops")),
    *(f"model/{name}.py" for name in ("anchors", "boxes", "build", "init", "matching", "optimise")),
)


def core_version() -> str:
    """Hash the code that decides a run's figures."""
    return code_version(CORE)


def portable(cfg: Config) -> dict[str, Any]:
    """The configuration without the places of files, which differ between machines; digests stand for what is in them.

    What the task does not read is left out too: a source of proposals is the same cell as that row of Table 1.
    """
    values = cfg.model_dump(mode="json", exclude={"out"})
    for place in ("root", "train", "val"):
        values["data"].pop(place, None)
    values["backbone"]["weights"] = Path(cfg.backbone.weights).name
    values["weights"] = Path(cfg.weights).name if cfg.weights else None
    if isinstance(cfg.task, RPNTask):
        del values["recipe"]["roi"]
    if isinstance(cfg.task, FastRCNNTask) and cfg.task.proposals.file:
        values["task"]["proposals"]["file"] = Path(cfg.task.proposals.file).name
    return values


def fingerprint_inputs(
    cfg: Config, data: str, weights: str, device: str, deterministic: bool, proposals: str | None = None
) -> dict[str, Any]:
    """All that decides a run's figures. `device` and `deterministic` are what the run has; `data`, `weights` (of the backbone,
    or of the whole detector that is evaluated) and `proposals` are digests, the last one that of the file
    `task.proposals.file`, where there is one."""
    config = {key: value for key, value in portable(cfg).items() if key not in INCIDENTAL}
    del config["recipe"]["name"]  # it tells what was overridden, and that is in the configuration itself
    return {
        "config": config,
        "data": data,
        "weights": weights,
        "device": device,
        "deterministic": deterministic,
        "code": core_version(),
        **({} if proposals is None else {"proposals": proposals}),
    }


def fingerprint(facts: dict[str, Any]) -> str:
    """The identity of a cell."""
    return digest(facts)


def comparison_key(facts: dict[str, Any], factors: Iterable[str]) -> str:
    """What the rows of a table have in common: everything but the declared factors (dotted keys, as Config's) and the seed."""
    shared, factors = dict(facts), (*factors, "seed")
    for factor in factors:
        shared["config"] = _without(shared["config"], factor)
    if {"backbone", "weights"} & set(factors):
        del shared["weights"]
    return digest(shared)


def _without(values: dict[str, Any], key: str) -> dict[str, Any]:
    """Nested `values` less a dotted key and all below it; as they are where there is no such key."""
    first, _, rest = key.partition(".")
    if rest and isinstance(values.get(first), dict):
        return values | {first: _without(values[first], rest)}
    return {name: value for name, value in values.items() if rest or name != first}

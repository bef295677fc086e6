"""Identity of a run: hash its configuration, data, starting weights, device and code, but no time stamp."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fpn_ablate.config.dense import DenseTask
from fpn_ablate.config.factors import under
from fpn_ablate.config.schema import INCIDENTAL, Config, FastRCNNTask, RPNTask, SegmentProposalsTask
from fpn_ablate.engine import versions
from fpn_ablate.utils.hashing import digest


def portable(cfg: Config) -> dict[str, Any]:
    """Return the configuration without paths, which differ between machines; digests identify the files' contents.

    Keys that are not read are left out too, so that a source of proposals is the same run as its row of Table 1.
    """
    values = cfg.model_dump(mode="json", exclude={"out"})
    for key in ("root", "train", "val", "links"):
        values["data"].pop(key, None)
    values["backbone"]["weights"] = Path(cfg.backbone.weights).name
    values["weights"] = Path(cfg.weights).name if cfg.weights else None
    if cfg.backbone.weights != "pretrain":
        del values["recipe"]["pretrain"]
    if cfg.image_pyramid is None:
        del values["image_pyramid"]  # its absence is no fact: runs older than the key are the same
    if isinstance(cfg.task, RPNTask | SegmentProposalsTask | DenseTask):
        del values["recipe"]["roi"]
    if isinstance(cfg.task, SegmentProposalsTask | DenseTask):
        del values["rpn"]
    if isinstance(cfg.task, FastRCNNTask) and cfg.task.proposals.file:
        values["task"]["proposals"] = {"file": Path(cfg.task.proposals.file).name}
        del values["rpn"]  # it makes no proposals
    return values


def requested(cfg: Config) -> dict[str, Any]:
    """Return what the configuration says of a run's figures."""
    config = {key: value for key, value in portable(cfg).items() if key not in INCIDENTAL}
    del config["recipe"]["name"]  # it lists overrides, whose values the configuration holds
    return config


def fingerprint_inputs(
    cfg: Config,
    data: str,
    weights: str,
    device: str,
    deterministic: bool,
    proposals: str | None = None,
    threads: int | None = None,
    bf16: bool = False,
) -> dict[str, Any]:
    """Return everything that decides a run's figures.

    Args:
        data, weights, proposals: digests of both splits, of the starting backbone or the evaluated detector, and of the file
            task.proposals.file if there is one.
        device, deterministic: the actual device's name and setting, where the configuration may say `auto`.
        threads: their actual number on a CPU, where it decides the last bits; None on a GPU.
        bf16: whether convolutions run in bf16 on the actual device.
    """
    return {
        "config": requested(cfg),
        "data": data,
        "weights": weights,
        "device": device,
        "deterministic": deterministic,
        "code": versions.core_version(),
        "parts": versions.part_versions(cfg),
        **({} if proposals is None else {"proposals": proposals}),
        **({} if threads is None else {"threads": threads}),
        **({"bf16": True} if bf16 else {}),
    }


def fingerprint(facts: dict[str, Any]) -> str:
    """Return the identity of a run."""
    return digest(facts)


def comparison_key(facts: dict[str, Any], factors: Iterable[str]) -> str:
    """Hash everything but the declared factors (dotted keys of Config), the seed and the threads: a table's rows share it."""
    shared, factors = {key: value for key, value in facts.items() if key != "threads"}, (*factors, "seed")
    for factor in factors:
        shared["config"] = _without(shared["config"], factor)
    shared["parts"] = {key: files for key, files in facts["parts"].items() if not under(key, factors)}
    if "task" in factors:
        shared["config"] = _without(shared["config"], "recipe.roi")  # of tasks with a second stage
    if {"backbone", "weights"} & set(factors):
        del shared["weights"]
        shared["config"] = _without(shared["config"], "recipe.pretrain")  # of a backbone's own weights
    return digest(shared)


def _without(values: dict[str, Any], key: str) -> dict[str, Any]:
    """Return nested `values` without a dotted key and all below it; unchanged if there is no such key."""
    first, _, rest = key.partition(".")
    if rest and isinstance(values.get(first), dict):
        return values | {first: _without(values[first], rest)}
    return {name: value for name, value in values.items() if rest or name != first}

"""What makes two runs the same: configuration that matters, data, starting weights, device and code. Never a time stamp."""

import ast
import hashlib
import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from fpn_ablate.paths import PACKAGE
from fpn_ablate.schema import INCIDENTAL, Config, FastRCNNTask, RPNTask

# Everything that can change a figure; bookkeeping, reports, logging and the command line cannot.
CORE = (
    *("data", "model", "evaluate.py", "inputs.py", "metrics.py", "optim.py", "pretrain.py", "proposals.py"),
    *("recall.py", "seeding.py", "tasks.py", "train.py", "checkpoint.py", "weights"),
)


def digest(value: Any) -> str:
    """16 hex digits of sha256 over canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


@lru_cache
def code_version(parts: tuple[str, ...] = CORE) -> str:
    """Of the core's syntax trees without docstrings: comments and formatting do not make a new version."""
    sources = []
    for part in parts:
        files = [PACKAGE / part] if part.endswith(".py") else sorted((PACKAGE / part).rglob("*.py"))
        sources += [(str(f.relative_to(PACKAGE)), _without_docstrings(f.read_text())) for f in files]
    return digest(sources)


def _without_docstrings(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            node.body = body[1:]
    return ast.dump(tree)


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
        del values["recipe"]["box"]
    if isinstance(cfg.task, FastRCNNTask) and cfg.task.proposals.file:
        values["task"]["proposals"]["file"] = Path(cfg.task.proposals.file).name
    return values


def facts(
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
        "code": code_version(),
        **({} if proposals is None else {"proposals": proposals}),
    }


def fingerprint(facts: dict[str, Any]) -> str:
    """The identity of a cell."""
    return digest(facts)


def setting(facts: dict[str, Any], factors: Iterable[str]) -> str:
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

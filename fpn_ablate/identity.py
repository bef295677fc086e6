"""What makes two runs the same: configuration that matters, data, starting weights, device and code. Never a time stamp."""

import ast
import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from fpn_ablate.paths import PACKAGE
from fpn_ablate.schema import FACTORS, INCIDENTAL, Config

# Everything that can change a figure; reports, logging and the command line cannot.
CORE = ("data", "model", "evaluate.py", "metrics.py", "optim.py", "pretrain.py", "run.py", "seeding.py", "train.py")


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
    """The configuration without the places of files, which differ between machines; digests stand for what is in them."""
    values = cfg.model_dump(mode="json", exclude={"out"})
    for place in ("root", "train", "val"):
        values["data"].pop(place, None)
    values["backbone"]["weights"] = Path(cfg.backbone.weights).name
    return values


def facts(cfg: Config, data: str, weights: str, device: str, deterministic: bool) -> dict[str, Any]:
    """All that decides a run's figures. `data` and `weights` are digests; `device` and `deterministic` are what the run has."""
    return {
        "config": {key: value for key, value in portable(cfg).items() if key not in INCIDENTAL},
        "data": data,
        "weights": weights,
        "device": device,
        "deterministic": deterministic,
        "code": code_version(),
    }


def fingerprint(facts: dict[str, Any]) -> str:
    """The identity of a cell."""
    return digest(facts)


def setting(facts: dict[str, Any]) -> str:
    """What the rows of a table have in common: everything but the declared factors and the seed."""
    shared = {k: v for k, v in facts["config"].items() if k not in (*FACTORS, "seed")}
    return digest({**facts, "config": shared})

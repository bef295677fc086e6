"""Estimate how long a run takes, from finished runs below the same `out`, or from what was measured on two CPU cores."""

import statistics
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from fpn_ablate.config import user_parts
from fpn_ablate.config.schema import Config
from fpn_ablate.store import record
from fpn_ablate.store.layout import row_folder
from fpn_ablate.utils.files import modified, safe_name
from fpn_ablate.utils.gpus import visible_gpus
from fpn_ablate.utils.numbers import is_finite
from fpn_ablate.utils.paths import RECORD

RECORDS = 20  # read at most
START = 10.0  # seconds of a process before its run begins
# Seconds a step and beside the steps, of one row on one of two CPU cores: generated data, results/README.md.
MEASURED = {"smoke": (0.3, 20.0), "quick": (0.19, 20.0), "reference": (0.3, 25.0)}


@dataclass(frozen=True)
class Pace:
    """Seconds of a training step, and those of everything else: start, evaluation, pictures, latency."""

    seconds_per_step: float
    rest: float = 0.0

    def seconds(self, cfg: Config, done: int = 0) -> float:
        """Return the seconds that a run still takes once `done` steps are done."""
        return self.seconds_per_step * (cfg.steps - done) + self.rest


def expected_pace(cfg: Config) -> Pace | None:
    """Return the pace of the row's finished runs of this recipe and data, else of the table's; None if nothing is known."""
    folder = row_folder(cfg)
    for files in (folder.glob(f"*/{RECORD}"), folder.parent.glob(f"*/*/{RECORD}")):
        if paces := list(_paces(files, cfg)):
            return Pace(*(statistics.median(values) for values in zip(*paces, strict=True)))
    on_cpu = cfg.device == "cpu" or (cfg.device == "auto" and not visible_gpus())
    measured = MEASURED.get(cfg.recipe.name.split("+")[0]) if on_cpu and cfg.data.name == "shapes" else None
    return Pace(*measured) if measured else None


def _paces(files: Iterable[Path], cfg: Config) -> Iterable[tuple[float, float]]:
    for file in sorted(files, key=modified, reverse=True)[:RECORDS]:
        content = record.read(file.parent) or {}
        cost = content.get("cost")
        if content.get("status") != "finished" or content.get("data") != cfg.data_name or not isinstance(cost, dict):
            continue
        names = ("steps", "resumed_at", "train_s", "eval_s", "pretrain_s", "proposals_s")
        figures = [cost.get(name, 0) for name in names]
        if all(map(is_finite, figures)) and (steps := figures[0] - figures[1]) > 0:
            train, evaluation, *before = figures[2:]
            yield train / steps, START + max(evaluation, _seconds(content) - train - sum(before))


def _seconds(content: dict[str, Any]) -> float:
    """Return the seconds from a run's start to its end; 0 if its record lacks one of them."""
    try:
        started, finished = (datetime.fromisoformat(content[key]) for key in ("started", "finished"))
        return (finished - started).total_seconds()
    except (KeyError, TypeError, ValueError):
        return 0.0


def steps_done(cfg: Config, code: str) -> int:
    """Return about how many steps of the cell's unfinished run are saved, from which it continues; 0 if it starts.

    What files hold, and on which device it ran, are not compared.

    Args:
        code: version of the core (`engine.versions`), since a run of another one is not continued.
    """
    done = [0]
    names = {"code": code, "recipe": cfg.recipe.name, "data": cfg.data_name, "row": cfg.row}  # a folder's name is cut
    names |= {"user_parts": user_parts.describe(cfg.user_parts)} if cfg.user_parts else {}
    for checkpoint in row_folder(cfg).glob(f"seed{cfg.seed}-*/checkpoint*.pt"):
        content = record.read(checkpoint.parent) or {}
        status = content.get("status")
        if status in ("interrupted", "running", "failed") and names.items() <= content.items():
            with suppress(OSError, ValueError):
                step = record.last_step(checkpoint.parent)
                done.append(step if status == "interrupted" else step - step % cfg.recipe.checkpoint_every)
    return min(max(done), cfg.steps)


def needs_pretraining(cfg: Config) -> bool:
    """Return whether the run pre-trains its backbone first, as no weights of that name are there."""
    folder = Path(cfg.out, "backbones")
    return cfg.backbone.weights == "pretrain" and not any(
        not file.stem.endswith("-checkpoint") for file in folder.glob(f"{safe_name(cfg.backbone.label)}-*.pt")
    )

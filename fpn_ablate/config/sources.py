"""Name the runs that a run builds on: the RPN whose proposals it learns from, or its network of an earlier step."""

from typing import Any

from fpn_ablate.config.schema import Config, RPNTask

SOURCES = "sources"  # in the place of a table's name: runs that only serve other runs


def sources(cfg: Config) -> dict[str, Config]:
    """Return the runs that a run builds on, by their role: `rpn`, or `second` (the second of the four steps)."""
    task = cfg.task
    if cfg.mode == "evaluate":
        return {}
    if cfg.procedure == "fast_rcnn" and not task.proposals.file:
        neck = task.proposals.neck
        return {"rpn": _source(cfg, task=RPNTask(name="rpn"), neck=neck, row=neck.row)}
    if cfg.procedure == "separate":
        return {"rpn": _source(cfg, task=RPNTask(name="rpn"))}
    if cfg.procedure == "four_step":
        return {"second": _source(cfg, task=task.model_copy(update={"training": "separate", "proposal_recall": False}))}
    return {}


def _source(cfg: Config, **changes: Any) -> Config:
    """Return a run of the same row with `changes`; its name omits +training=..., since runs of several procedures share it."""
    row = "+".join(part for part in cfg.row.split("+") if not part.startswith("training="))
    return cfg.model_copy(update={"table": SOURCES, "row": row, **changes})

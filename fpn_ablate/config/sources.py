"""Name the runs that a run builds on: the RPN whose proposals it learns from, or a network that it continues or tests."""

from typing import Any

from fpn_ablate.config.schema import Config
from fpn_ablate.config.tasks import RPNTask

SOURCES = "sources"  # in the place of a table's name: runs that only serve other runs


def sources(cfg: Config) -> dict[str, Config]:
    """Return the runs that a run builds on, by their role.

    `rpn` makes its proposals, `second` is the second of the four steps, and `without_pyramid` trains the detector that this run
    tests with an image pyramid.
    """
    task = cfg.task
    if cfg.mode == "evaluate":
        return {}
    runs = {}
    if cfg.procedure == "fast_rcnn" and not task.proposals.file:
        neck = task.proposals.neck
        runs["rpn"] = _source(cfg, task=RPNTask(name="rpn"), neck=neck, row=neck.row, image_pyramid=None)
    if cfg.procedure == "separate":
        runs["rpn"] = _source(cfg, task=RPNTask(name="rpn"))
    if cfg.trained_without_pyramid:
        runs["without_pyramid"] = _source(cfg, image_pyramid=None, row=cfg.neck.row)
    elif cfg.procedure == "four_step":
        runs["second"] = _source(cfg, task=task.model_copy(update={"training": "separate", "proposal_recall": False}))
    return runs


def _source(cfg: Config, **changes: Any) -> Config:
    """Return a run of the same row with `changes`; its name omits +training=..., since runs of several procedures share it."""
    row = "+".join(part for part in cfg.row.split("+") if not part.startswith("training="))
    return cfg.model_copy(update={"table": SOURCES, "row": row, **changes})

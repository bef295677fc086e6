"""Read both splits of a run's data as tables, with every problem for which the run would be refused."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from fpn_ablate.config.schema import Coco, Config
from fpn_ablate.data import coco
from fpn_ablate.data.checks.annotations import Annotations, parse
from fpn_ablate.data.checks.examine import Report, examine
from fpn_ablate.data.checks.findings import Finding, Findings
from fpn_ablate.engine.inputs import load_data


@dataclass(frozen=True)
class Split:
    """A split as a run would see it.

    Attributes:
        report: the findings in its files; for generated pictures none, and no paths.
        bounds: where small ends and large begins, in square native pixels.
        table: the readable annotations, bad boxes repaired as data.invalid says, or left out if the run would be refused for
            them; None if the file is unreadable, or its boxes are.
        keep_empty: False: the run uses images with objects alone.
    """

    name: str  # train | val
    report: Report
    bounds: tuple[float, float]
    table: Annotations | None
    keep_empty: bool = True
    refused: Sequence[Finding] = ()
    repairs: dict[str, int] = field(default_factory=dict)


def splits_of(cfg: Config) -> tuple[list[Split], list[str]]:
    """Return training and validation split, and reasons to refuse them that concern both.

    Raises:
        UserError: data.root is no folder.
    """
    if not isinstance(cfg.data, Coco):
        splits = []
        for name, dataset in zip(("train", "val"), load_data(cfg.data, cfg.recipe, cfg.mode, cfg.task.masks), strict=True):
            table = parse(dataset.coco() | {"info": {"generated": True}}, name, Findings())
            splits.append(Split(name, Report(None, None, [], table, None), dataset.area_bounds, table))
        return splits, []
    root, splits = coco.root_of(cfg.data), []
    for name, files, keep_empty in (("train", cfg.data.train, cfg.data.keep_empty), ("val", cfg.data.val, True)):
        report = examine(root / files.annotations, root / files.images, cfg.data.links, cfg.task.masks)
        splits.append(_read(name, report, cfg.data.invalid, keep_empty))
    train, val = (split.table for split in splits)
    reasons = [
        None if val is None else coco.unfit_to_evaluate(cfg.data, val, cfg.recipe.eval_images),
        None if train is None or val is None else coco.unfit(cfg.data, train, val),
    ]
    return splits, [reason for reason in reasons if reason]


def _read(name: str, report: Report, invalid: str, keep_empty: bool) -> Split:
    """Make a split from the findings in its files."""
    table, repairs, refused = None, {}, report.refused(invalid)
    fractions = any(finding.kind == "boxes-normalised" for finding in refused)  # sizes and anchors would tell of nothing else
    if report.annotations is not None and len(report.annotations.image_ids) and not fractions:
        valid = (report.annotations.image_index >= 0) & (report.annotations.labels > 0)
        table, repairs = coco.repaired(report.annotations.select(valid), "drop" if invalid == "error" else invalid)
    repairs = {} if invalid == "error" and refused else repairs
    return Split(name, report, coco.CocoDataset.area_bounds, table, keep_empty, refused, repairs)

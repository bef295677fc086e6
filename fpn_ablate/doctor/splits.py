"""Read both splits of a run's data as tables, with every problem for which the run would be refused.

N images, M annotations of a split.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fpn_ablate.config.schema import Coco, Config
from fpn_ablate.data import coco
from fpn_ablate.data.checks.annotations import Annotations
from fpn_ablate.data.checks.examine import Report, examine
from fpn_ablate.data.checks.findings import BOX, BROKEN, Finding
from fpn_ablate.engine.inputs import load_data
from fpn_ablate.structures.batch import DetectionDataset


@dataclass(frozen=True)
class Split:
    """A split as a run would see it.

    Attributes:
        table: the readable annotations, bad boxes repaired as data.invalid says, or left out if the run would be refused for
            them; None if the file is unreadable.
        used: (N,) bool, the images that a run uses: with data.keep_empty=false only those with objects.
        file_bytes: (N,) int64, 0 for a missing file; None for generated pictures.
        bounds: where small ends and large begins, in square native pixels.
    """

    name: str  # train | val
    table: Annotations | None
    used: np.ndarray
    bounds: tuple[float, float]
    file: str | None = None
    folder: str | None = None
    findings: Sequence[Finding] = ()
    refused: Sequence[Finding] = ()
    repairs: dict[str, int] = field(default_factory=dict)
    file_bytes: np.ndarray | None = None


def splits_of(cfg: Config) -> tuple[list[Split], list[str]]:
    """Return training and validation split, and reasons to refuse them that concern both.

    Raises:
        UserError: data.root is no folder.
    """
    if not isinstance(cfg.data, Coco):
        pairs = zip(("train", "val"), load_data(cfg.data, cfg.recipe, cfg.mode), strict=True)
        return [_generated(name, dataset) for name, dataset in pairs], []
    root, splits = coco.root_of(cfg.data), []
    for name, files, keep_empty in (("train", cfg.data.train, cfg.data.keep_empty), ("val", cfg.data.val, True)):
        splits.append(_read(name, examine(root / files.annotations, root / files.images), cfg.data.invalid, keep_empty))
    tables = [split.table for split in splits]
    reason = None if None in tables else coco.unfit(cfg.data, *tables)
    return splits, [reason] if reason else []


def _read(name: str, report: Report, invalid: str, keep_empty: bool) -> Split:
    """Make a split from the findings in its files."""
    refused = report.at(BROKEN, BOX) if invalid == "error" else report.at(BROKEN)
    table, repairs, used = None, {}, np.zeros(0, bool)
    if report.annotations is not None and len(report.annotations.image_ids):
        valid = (report.annotations.image_index >= 0) & (report.annotations.labels > 0)
        table, repairs = coco.repaired(_only(report.annotations, valid), "drop" if invalid == "error" else invalid)
        used = np.ones(len(table.image_ids), bool)
        if not keep_empty:
            used = np.bincount(table.image_index[~table.crowd], minlength=len(used)) > 0
    files = (report.annotations_file, report.image_folder, report.findings, refused)
    repairs = {} if invalid == "error" and refused else repairs
    return Split(name, table, used, coco.CocoDataset.area_bounds, *files, repairs, report.file_bytes)


def _only(table: Annotations, mask: np.ndarray) -> Annotations:
    """Keep the annotations where `mask` (M,) is true, and all images."""
    columns = ("ids", "image_index", "labels", "boxes", "areas", "crowd")
    return replace(table, **{column: getattr(table, column)[mask] for column in columns})


def _generated(name: str, dataset: DetectionDataset) -> Split:
    """Make a split from a generated set."""
    truth = dataset.coco()
    images, rows = truth["images"], truth["annotations"]
    position = {image["id"]: n for n, image in enumerate(images)}
    label = {category["id"]: k for k, category in enumerate(dataset.categories, start=1)}
    table = Annotations(
        [dict(category) for category in dataset.categories],
        np.array(list(position), np.int64),
        [image["file_name"] for image in images],
        np.array([(image["height"], image["width"]) for image in images], np.int64).reshape(-1, 2),
        np.array([row["id"] for row in rows], np.int64),
        np.array([position[row["image_id"]] for row in rows], np.int64),
        np.array([label[row["category_id"]] for row in rows], np.int64),
        np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4),
        np.array([row["area"] for row in rows], np.float64),
        np.array([row["iscrowd"] for row in rows], bool),
        generated=True,
    )
    return Split(name, table, np.ones(len(images), bool), dataset.area_bounds)

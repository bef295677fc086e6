"""Convert what a finished run detects to COCO's result format, for tools of others."""

from typing import Any

from fpn_ablate.evaluation.recall import image_sizes
from fpn_ablate.runs.draw import FinishedRun, common_split
from fpn_ablate.utils.errors import UserError


def coco_results(run: FinishedRun, masks: bool = False) -> list[dict[str, Any]]:
    """Return boxes, or masks, with the ids of images and categories of the data set; proposals have category 1.

    Raises:
        UserError: the run has no masks, or as `common_split`.
    """
    if masks and run.detections.masks is None:
        raise UserError(f"{run.folder}: its detections have no masks; leave out --masks")
    dataset = common_split([run])
    categories = None if run.detections.labels is None else dataset.categories
    return run.detections.coco_results(categories, image_sizes(dataset.coco()) if masks else None)

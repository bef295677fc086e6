"""Bootstrap over images: evaluate saved detections on resampled images.

All rows are evaluated on the same samples, so that differences between rows are paired (`fpn_ablate.report.collate.stats`).
I images, B replicates (samples of I images), K categories.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fpn_ablate.evaluation.coco import (
    AREAS,
    By,
    DetectionSet,
    area_ranges,
    evaluator,
    mask_name,
    match,
    mean,
    precision_by_size,
    proposal_name,
    quietly,
    recall_name,
)
from fpn_ablate.evaluation.recall import Matches

# 400 replicates give an interval's width to 4 %, 100 to 7 % (1 / sqrt(2 B)). With 5000 images and 80 categories a replicate
# takes more than a second, and with so many images the seeds matter more.
REPLICATES, FEW_REPLICATES, MANY_IMAGES = 400, 100, 1000


def bootstrap_indices(images: int, generator: np.random.Generator, replicates: int | None = None) -> np.ndarray:
    """Draw positions of images with replacement: (B, I). The default of B is 400, or 100 for more than 1000 images."""
    replicates = replicates or (REPLICATES if images <= MANY_IMAGES else FEW_REPLICATES)
    return generator.integers(images, size=(replicates, images))


def bootstrap_metrics(
    truth: dict[str, Any],
    detections: DetectionSet,
    categories: Sequence[dict[str, Any]],
    area_bounds: tuple[float, float],
    indices: np.ndarray,
    proposals: DetectionSet | None = None,
) -> dict[str, np.ndarray]:
    """Compute each metric on the images of each replicate.

    Args:
        truth, detections, categories, area_bounds: as for `average_recall` and `average_precision`.
        indices: (B, I) positions in the images of `truth`, sorted by id, from `bootstrap_indices`.
        proposals: of the same network, if their recall is evaluated beside detections with labels.

    Returns:
        {metric: (B,) values}, NaN where undefined: AP, mask_AP where there are masks, and AR100 of detections with labels,
        AR100 and AR1k of proposals, which are called proposal_AR100, ... beside detections.
    """
    areas, labels = area_ranges(area_bounds), detections.labels is not None
    limits = (100,) if labels else (100, 1000)
    recall = _recall(match(truth, detections, areas, limits), limits, indices)
    if not labels:
        return recall
    precision = _precision(_MatchedImages(truth, detections, categories, areas, limits), indices)
    if detections.masks is not None:
        of_masks = _precision(_MatchedImages(truth, detections, categories, areas, limits, "segm"), indices)
        precision |= {mask_name(name): values for name, values in of_masks.items()}
    if proposals is not None:
        of_proposals = bootstrap_metrics(truth, proposals, categories, area_bounds, indices)
        recall |= {proposal_name(name): values for name, values in of_proposals.items()}
    return precision | recall


def per_image_metrics(
    truth: dict[str, Any], detections: DetectionSet, categories: Sequence[dict[str, Any]]
) -> tuple[np.ndarray, np.ndarray]:
    """Evaluate each image alone: AP of boxes, or AR100 without labels.

    Returns:
        Image ids (I,), rising, and values (I,), NaN without objects.
    """
    all_areas = [(0, 1e10)]
    if detections.labels is None:
        matches = match(truth, detections, all_areas, (100,))
        matched, objects = matches.matched[:, 0, 0].mean(-1), matches.objects[:, 0]
        recall = np.divide(matched, objects, out=np.full(len(matched), np.nan), where=objects > 0)
        return matches.ids, recall.astype(np.float32)
    images = _MatchedImages(truth, detections, categories, all_areas, (100,))
    values = [mean(images.evaluate([i])["precision"]) for i in range(len(images.ids))]
    return np.array(images.ids), np.array([np.nan if value is None else value for value in values], np.float32)


def _recall(matches: Matches, limits: tuple[int, ...], indices: np.ndarray) -> dict[str, np.ndarray]:
    """Compute recall of each replicate: a ratio of sums over images, so images are matched once and replicates only add up."""
    counts = np.stack([np.bincount(row, minlength=indices.shape[1]) for row in indices]).astype(float)  # (B, I)
    objects, metrics = counts @ matches.objects, {}
    for m, limit in enumerate(limits):
        matched = counts @ matches.matched[:, m].mean(-1)
        recall = np.divide(matched, objects, out=np.full(objects.shape, np.nan), where=objects > 0)
        metrics |= {recall_name(limit, area): recall[:, a] for a, area in enumerate(AREAS)}
    return metrics


def _precision(images: "_MatchedImages", indices: np.ndarray) -> dict[str, np.ndarray]:
    """Compute precision of each replicate. It is no ratio of sums: the detections of a replicate are ranked together."""
    rows = [precision_by_size(images.evaluate(row)["precision"][..., 0], images.thresholds) for row in indices.tolist()]
    return {name: np.array([np.nan if row[name] is None else row[name] for row in rows]) for name in rows[0]}


class _MatchedImages:
    """Images matched once, each alone; faster-coco-eval's own code accumulates any combination of them."""

    def __init__(
        self,
        truth: dict[str, Any],
        detections: DetectionSet,
        categories: Sequence[dict[str, Any]],
        areas: list[tuple[float, float]],
        limits: tuple[int, ...],
        by: By = "bbox",
    ) -> None:
        evaluation = evaluator(truth, detections, categories, areas, limits, by=by)
        evaluation.separate_eval = True  # keep the matches of each image
        with quietly():
            evaluation.evaluate()
        self.params = evaluation._paramsEval
        self.thresholds = self.params.iouThrs
        self.ids = list(self.params.imgIds)
        kinds = len(evaluation._evalImgs_cpp) // len(self.ids)  # categories x areas; images are the last dimension
        self._matched = [evaluation._evalImgs_cpp[k * len(self.ids) : (k + 1) * len(self.ids)] for k in range(kinds)]

    def evaluate(self, positions: list[int]) -> dict[str, np.ndarray]:
        """Return COCOeval's precision and recall arrays of the images at `positions`, which may repeat."""
        from faster_coco_eval import faster_eval_api_cpp

        self.params.imgIds = [self.ids[i] for i in positions]
        return faster_eval_api_cpp.COCOevalAccumulate(self.params, [kind[i] for kind in self._matched for i in positions])

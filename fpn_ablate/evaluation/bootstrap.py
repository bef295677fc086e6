"""A run's metrics on images drawn anew: what the bootstrap over images needs, from saved detections alone.

Every row is evaluated on the same drawn images, so that differences between rows are paired (`fpn_ablate.report.collate.stats`).
I images, B replicates, K categories.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fpn_ablate.evaluation.coco import (
    AREAS,
    DetectionSet,
    area_ranges,
    evaluator,
    mean,
    precision_by_size,
    quietly,
    recall_name,
)
from fpn_ablate.evaluation.recall import Hits, hits

# An interval's width is known to 4 % from 400 replicates, to 7 % from 100 (1 / sqrt(2 B)). Of 5000 images with 80 categories
# each takes more than a second, and there the images matter less beside the seeds.
REPLICATES, MANY, FEW = 400, 1000, 100


def bootstrap_indices(images: int, generator: np.random.Generator, replicates: int | None = None) -> np.ndarray:
    """(B, I) positions of images, drawn with replacement; B is 400, or 100 of more than 1000 images, if not given."""
    replicates = replicates or (REPLICATES if images <= MANY else FEW)
    return generator.integers(images, size=(replicates, images))


def bootstrap_metrics(
    truth: dict[str, Any],
    detections: DetectionSet,
    categories: Sequence[dict[str, Any]],
    area_bounds: tuple[float, float],
    drawn: np.ndarray,
) -> dict[str, np.ndarray]:
    """{metric: (B,) values}, NaN where undefined, as `average_recall` and `average_precision` give on the drawn images.

    Args:
        truth, detections, categories, area_bounds: as there. Detections with labels have AP and AR100, others AR100 and AR1k.
        drawn: (B, I) positions in the images of `truth`, sorted by id (`draws`).
    """
    areas, labels = area_ranges(area_bounds), detections.labels is not None
    limits = (100,) if labels else (100, 1000)
    recall = _recall(_hits(truth, detections, areas, limits), limits, drawn)
    return _precision(_Images(truth, detections, categories, areas, limits), drawn) | recall if labels else recall


def per_image_metrics(
    truth: dict[str, Any], detections: DetectionSet, categories: Sequence[dict[str, Any]]
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the images, rising, and what each is worth alone: AP, or AR100 without labels; NaN without objects. (I,), (I,)"""
    every = [(0, 1e10)]
    if detections.labels is None:
        each = _hits(truth, detections, every, (100,))
        found, objects = each.found[:, 0, 0].mean(-1), each.objects[:, 0]
        return each.ids, np.divide(found, objects, out=np.full(len(found), np.nan), where=objects > 0).astype(np.float32)
    images = _Images(truth, detections, categories, every, (100,))
    values = [mean(images.evaluate([i])["precision"]) for i in range(len(images.ids))]
    return np.array(images.ids), np.array([np.nan if value is None else value for value in values], np.float32)


def _hits(truth: dict[str, Any], detections: DetectionSet, areas: list[tuple[float, float]], limits: tuple[int, ...]) -> Hits:
    return hits(truth, detections.image_ids, detections.boxes, detections.scores, areas, limits)


def _recall(each: Hits, limits: tuple[int, ...], drawn: np.ndarray) -> dict[str, np.ndarray]:
    """Recall is a ratio of sums over images, so each image is matched once, and the replicates only add up."""
    times = np.stack([np.bincount(row, minlength=drawn.shape[1]) for row in drawn]).astype(float)  # (B, I)
    total, found = times @ each.objects, {}
    for m, limit in enumerate(limits):
        counted = times @ each.found[:, m].mean(-1)
        recall = np.divide(counted, total, out=np.full(total.shape, np.nan), where=total > 0)
        found |= {recall_name(limit, area): recall[:, a] for a, area in enumerate(AREAS)}
    return found


def _precision(images: "_Images", drawn: np.ndarray) -> dict[str, np.ndarray]:
    """Precision is not: the detections of all drawn images are put in order anew."""
    lines = [precision_by_size(images.evaluate(row)["precision"][..., 0], images.thresholds) for row in drawn.tolist()]
    return {name: np.array([np.nan if line[name] is None else line[name] for line in lines]) for name in lines[0]}


class _Images:
    """Images matched once, each on its own, and accumulated in any combination by faster-coco-eval's own code."""

    def __init__(
        self,
        truth: dict[str, Any],
        detections: DetectionSet,
        categories: Sequence[dict[str, Any]],
        areas: list[tuple[float, float]],
        limits: tuple[int, ...],
    ) -> None:
        evaluation = evaluator(truth, detections, categories, areas, limits)
        evaluation.separate_eval = True  # keeps what was found in each image
        with quietly():
            evaluation.evaluate()
        self.params = evaluation._paramsEval
        self.thresholds = self.params.iouThrs
        self.ids = list(self.params.imgIds)
        kinds = len(evaluation._evalImgs_cpp) // len(self.ids)  # categories x areas; images are the last dimension
        self._matched = [evaluation._evalImgs_cpp[k * len(self.ids) : (k + 1) * len(self.ids)] for k in range(kinds)]

    def evaluate(self, positions: list[int]) -> dict[str, np.ndarray]:
        """Precision and recall, as COCOeval gives them, of these images alone; an image may stand there several times."""
        from faster_coco_eval import faster_eval_api_cpp

        self.params.imgIds = [self.ids[i] for i in positions]
        return faster_eval_api_cpp.COCOevalAccumulate(self.params, [kind[i] for kind in self._matched for i in positions])

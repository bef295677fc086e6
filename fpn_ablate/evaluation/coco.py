"""Average recall of proposals (Sec. 5.1) and average precision of detections (Sec. 5.2), as COCO's evaluator computes them.

Both are averaged over IoU .50:.05:.95; recall is class-agnostic. M boxes, K categories.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fpn_ablate.evaluation.recall import hits

Engine = Literal["faster-coco-eval", "pycocotools"]
AREAS = ("all", "small", "medium", "large")
SUFFIX = {"all": "", "small": "_s", "medium": "_m", "large": "_l"}


@dataclass(frozen=True)
class DetectionSet:
    """Boxes of many images in native pixels: image_ids (M,) int64, boxes (M, 4) XYXY float32, scores (M,) float32.

    labels: (M,) int64, 1..K; None for class-agnostic proposals.
    """

    image_ids: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray | None = None

    def save(self, path: Path) -> None:
        labels = {} if self.labels is None else {"labels": self.labels}
        np.savez_compressed(path, image_ids=self.image_ids, boxes=self.boxes, scores=self.scores, **labels)

    @staticmethod
    def load(path: Path) -> "DetectionSet":
        with np.load(path, allow_pickle=False) as data:
            return DetectionSet(data["image_ids"], data["boxes"], data["scores"], data.get("labels"))

    def coco_results(self, categories: Sequence[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
        """As a COCO results list.

        Args:
            categories: those of the data set; position k is label k + 1. Without them every box has category 1.

        Raises ValueError where categories are asked for and labels are missing or not in 1..K.
        """
        boxes = self.boxes.astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        return [
            {"image_id": int(i), "category_id": c, "bbox": b, "score": float(s)}
            for i, c, b, s in zip(self.image_ids, self._category_ids(categories), boxes.tolist(), self.scores, strict=True)
        ]

    def _category_ids(self, categories: Sequence[dict[str, Any]] | None) -> list[int]:
        if categories is None:
            return [1] * len(self.boxes)
        if self.labels is None:
            raise ValueError("detections without labels have no categories")
        if ((self.labels < 1) | (self.labels > len(categories))).any():
            raise ValueError(f"labels are 1..{len(categories)}, not {self.labels.min()}..{self.labels.max()}")
        return [categories[label - 1]["id"] for label in self.labels.tolist()]


def evaluator_name() -> str:
    """What makes the figures of records; equal to pycocotools', as the tests hold it."""
    return f"recall: fpn_ablate's own, precision: faster-coco-eval {version('faster-coco-eval')}"


def average_recall(
    truth: dict[str, Any],
    detections: DetectionSet,
    area_bounds: tuple[float, float] = (32**2, 96**2),
    limits: Sequence[int] = (100, 1000),
    engine: Engine | None = None,
) -> dict[str, float | None]:
    """AR at the best `limits` boxes an image, over all images of `truth`, by size of the object. Labels do not matter.

    Args:
        truth: a COCO instances dictionary. Crowd regions are ignored, as COCO does.
        area_bounds: where small ends and where large begins, in square pixels of `truth`.
        engine: an evaluator of COCO's in place of `fpn_ablate.evaluation.recall`, for comparison. For 1,000 proposals in each of 5,000
            images that one takes seconds, these minutes and 8 GiB.

    Returns:
        {"AR100": ..., "AR100_s": ..., ..., "AR1k_l": ...} in 0..1; None where no object of that size exists.
    """
    ranges = area_ranges(area_bounds)
    if engine is None:
        found = hits(truth, detections.image_ids, detections.boxes, detections.scores, ranges, limits).recall()
    else:
        evaluation = _evaluated(truth, detections, None, area_bounds, limits, engine)
        recall = evaluation.eval["recall"][:, 0]  # (IoU thresholds, areas, limits); -1 where there is nothing to recall
        found = np.where(recall.min(0) < 0, np.nan, recall.mean(0)).T
    return {
        recall_name(limit, area): None if np.isnan(found[m, a]) else float(found[m, a])
        for m, limit in enumerate(sorted(limits))
        for a, area in enumerate(AREAS)
    }


def average_precision(
    truth: dict[str, Any],
    detections: DetectionSet,
    categories: Sequence[dict[str, Any]],
    area_bounds: tuple[float, float] = (32**2, 96**2),
    limit: int = 100,
    engine: Engine = "faster-coco-eval",
) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """AP over all images of `truth`, and AP of each category; arguments as in `average_recall`.

    Args:
        categories: those of the data set; position k is label k + 1.
        limit: only the best so many detections of a category in an image count: COCO's evaluator cuts each category apart.

    Returns:
        {"AP": ..., "AP50": ..., "AP75": ..., "AP_s": ..., "AP_m": ..., "AP_l": ...} and {category's name: AP} in 0..1; None
        where no object exists. A category without objects does not count in the mean, as in COCO. Names that are not
        unique have the id added.
    """
    evaluation = _evaluated(truth, detections, categories, area_bounds, [limit], engine)
    params = evaluation.params
    precision = evaluation.eval["precision"][..., 0]  # (IoU thresholds, recall thresholds, K, areas); -1: no object
    position = {int(key): k for k, key in enumerate(params.catIds)}  # the evaluator sorts by id
    per_class = {
        name: mean(precision[:, :, position[category["id"]], 0])
        for name, category in zip(unique_names(categories), categories, strict=True)
    }
    return precision_by_size(precision, params.iouThrs), per_class


def precision_by_size(precision: np.ndarray, thresholds: np.ndarray) -> dict[str, float | None]:
    """AP, AP50, AP75 and AP by size from an evaluation's precision: (IoU thresholds, recall thresholds, K, areas)."""
    metrics = {"AP": mean(precision[..., 0])}
    for name, threshold in (("AP50", 0.5), ("AP75", 0.75)):
        metrics[name] = mean(precision[np.isclose(thresholds, threshold), :, :, 0])
    for a, area in enumerate(AREAS[1:], start=1):
        metrics["AP" + SUFFIX[area]] = mean(precision[..., a])
    return metrics


def recall_name(limit: int, area: str) -> str:
    """AR100, AR1k_s, ..."""
    return (f"AR{limit // 1000}k" if limit % 1000 == 0 else f"AR{limit}") + SUFFIX[area]


def _evaluated(
    truth: dict[str, Any],
    detections: DetectionSet,
    categories: Sequence[dict[str, Any]] | None,
    area_bounds: tuple[float, float],
    limits: Sequence[int],
    engine: Engine,
) -> Any:
    """A COCOeval that has accumulated, by areas in the order of AREAS and by `limits` in rising order."""
    evaluation = evaluator(truth, detections, categories, area_ranges(area_bounds), limits, engine)
    with quietly():
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def area_ranges(area_bounds: tuple[float, float]) -> list[tuple[float, float]]:
    """The areas of AREAS, from where small ends and large begins; both ends belong to a range, as in COCO."""
    small, large = area_bounds
    return [(0, 1e10), (0, small), (small, large), (large, 1e10)]


def evaluator(
    truth: dict[str, Any],
    detections: DetectionSet,
    categories: Sequence[dict[str, Any]] | None,
    areas: Sequence[tuple[float, float]],
    limits: Sequence[int],
    engine: Engine = "faster-coco-eval",
) -> Any:
    """A COCOeval that has not evaluated yet, for these areas and, in rising order, `limits`.

    Without `categories` the evaluation is class-agnostic: all is of one category. `summarize` takes limits of its own for
    granted, and the engines differ in which: read the arrays.
    """
    if engine == "faster-coco-eval":
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval
    else:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

    both = (truth["annotations"], detections.coco_results(categories))
    with quietly():
        evaluation = COCOeval(*(_indexed(COCO(), truth["images"], categories, annotations) for annotations in both), "bbox")
    evaluation.params.maxDets = sorted(limits)
    evaluation.params.areaRng = [list(area) for area in areas]
    evaluation.params.areaRngLbl = [f"{low:g} to {high:g}" for low, high in areas]
    return evaluation


def _indexed(coco: Any, images: Any, categories: Sequence[dict[str, Any]] | None, annotations: list[dict[str, Any]]) -> Any:
    """The COCO object, filled. The annotations get ids from 1, since COCOeval takes the id 0 for "unmatched"."""
    category = {"category_id": 1} if categories is None else {}
    annotations = [
        {"iscrowd": 0, "area": a["bbox"][2] * a["bbox"][3], **a, **category, "id": i}
        for i, a in enumerate(annotations, start=1)
    ]
    declared = [{"id": 1, "name": "object"}] if categories is None else list(categories)
    coco.dataset = {"images": images, "categories": declared, "annotations": annotations}
    coco.createIndex()
    return coco


@contextmanager
def quietly() -> Iterator[None]:
    """Without the progress messages that pycocotools prints."""
    with redirect_stdout(io.StringIO()):
        yield


def mean(values: np.ndarray) -> float | None:
    """Over what is defined; None where nothing is."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else None


def unique_names(categories: Sequence[dict[str, Any]]) -> list[str]:
    """As figures by category call them: the name, with the id where several have it."""
    names = [category["name"] for category in categories]
    return [n if names.count(n) == 1 else f"{n} (id {c['id']})" for n, c in zip(names, categories, strict=True)]

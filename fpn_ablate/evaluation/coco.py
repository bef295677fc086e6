"""Average recall of proposals (Sec. 5.1) and average precision of detections (Sec. 5.2), equal to COCO's evaluator.

Both are averaged over IoU .50:.05:.95, of boxes or of masks; recall is class-agnostic. M boxes, K categories.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fpn_ablate.evaluation.recall import Matches, image_sizes, match_boxes
from fpn_ablate.utils import rle
from fpn_ablate.utils.files import open_arrays

Engine = Literal["faster-coco-eval", "pycocotools"]
By = Literal["bbox", "segm"]  # COCO's iouType
AREAS = ("all", "small", "medium", "large")
SUFFIX = {"all": "", "small": "_s", "medium": "_m", "large": "_l"}


@dataclass(frozen=True)
class DetectionSet:
    """Boxes of many images in native pixels: image_ids (M,) int64, boxes (M, 4) XYXY float32, scores (M,) float32.

    labels: (M,) int64, 1..K; None for class-agnostic proposals.
    masks: M masks (`utils.rle`) in pixels of their native images; None: boxes alone.
    """

    image_ids: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray | None = None
    masks: Sequence[bytes] | None = None

    @property
    def recall_by(self) -> By:
        """Return what recall compares with the objects: masks of class-agnostic proposals that have them, otherwise boxes."""
        return "segm" if self.masks is not None and self.labels is None else "bbox"

    def save(self, path: Path) -> None:
        """Write a compressed .npz file."""
        columns = {} if self.labels is None else {"labels": self.labels}
        if self.masks is not None:
            columns["masks"], columns["mask_lengths"] = rle.join(self.masks)
        np.savez_compressed(path, image_ids=self.image_ids, boxes=self.boxes, scores=self.scores, **columns)

    @staticmethod
    def load(path: Path) -> "DetectionSet":
        """Read what `save` writes."""
        with open_arrays(path) as data:
            masks = rle.split(data["masks"], data["mask_lengths"]) if "masks" in data else None
            return DetectionSet(data["image_ids"], data["boxes"], data["scores"], data.get("labels"), masks)

    def coco_results(
        self,
        categories: Sequence[dict[str, Any]] | None = None,
        sizes: Mapping[int, rle.Size] | None = None,
    ) -> list[dict[str, Any]]:
        """Convert to a COCO results list, of boxes or, with `sizes`, of masks.

        Entries of masks have no `bbox`: where there is one, COCO's API takes the box's area for the mask's.

        Args:
            categories: of the data set; position k is label k + 1. Without them all boxes have category 1.
            sizes: (height, width) of the images by id. Masks of other images are left out.

        Raises:
            ValueError: with categories, labels are missing or not in 1..K.
        """
        ids = [1] * len(self.boxes)
        if categories is not None:
            labels = [] if self.labels is None else self.labels.tolist()
            if len(labels) < len(ids) or not set(labels) <= set(range(1, len(categories) + 1)):
                raise ValueError(f"labels are {sorted(set(labels))}, not 1..{len(categories)}")
            ids = [categories[label - 1]["id"] for label in labels]
        rows = list(zip(self.image_ids.tolist(), ids, self.scores.tolist(), strict=True))
        if sizes is not None:
            return [
                {"image_id": i, "category_id": c, "segmentation": rle.coco_object(mask, sizes[i]), "score": s}
                for (i, c, s), mask in zip(rows, self.masks or (), strict=True)
                if i in sizes
            ]
        boxes = self.boxes.astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        return [
            {"image_id": i, "category_id": c, "bbox": box, "score": s}
            for (i, c, s), box in zip(rows, boxes.tolist(), strict=True)
        ]


def evaluator_name() -> str:
    """Name the evaluator behind a record's figures. Tests compare both parts with pycocotools."""
    return f"recall: fpn_ablate's own, precision: faster-coco-eval {version('faster-coco-eval')}"


def average_recall(
    truth: dict[str, Any],
    detections: DetectionSet,
    area_bounds: tuple[float, float] = (32**2, 96**2),
    limits: Sequence[int] = (100, 1000),
    engine: Engine | None = None,
) -> dict[str, float | None]:
    """Compute AR at the best `limits` boxes per image, over all images of `truth`, by size of the object, without labels.

    Proposals that have masks are compared by them, with the `segmentation` of objects.

    Args:
        truth: a COCO instances dictionary. Crowd regions are ignored, as in COCO.
        area_bounds: where small ends and where large begins, in square pixels of `truth`.
        engine: COCO's evaluator in place of `fpn_ablate.evaluation.recall`, for comparison. With 1,000 proposals in each of
            5,000 images it takes minutes and 8 GiB; ours takes seconds.

    Returns:
        {"AR100": ..., "AR100_s": ..., ..., "AR1k_l": ...} in 0..1; None where no object of that size exists.
    """
    ranges = area_ranges(area_bounds)
    if engine is None:
        values = match(truth, detections, ranges, limits).recall()
    else:
        evaluation = _accumulated(truth, detections, None, area_bounds, limits, engine, detections.recall_by)
        recall = evaluation.eval["recall"][:, 0]  # (IoU thresholds, areas, limits); -1 without objects
        values = np.where(recall.min(0) < 0, np.nan, recall.mean(0)).T
    return {
        recall_name(limit, area): None if np.isnan(values[m, a]) else float(values[m, a])
        for m, limit in enumerate(sorted(limits))
        for a, area in enumerate(AREAS)
    }


def match(
    truth: dict[str, Any], detections: DetectionSet, areas: Sequence[tuple[float, float]], limits: Sequence[int]
) -> Matches:
    """Match detections to the objects of `truth` for recall, as `match_boxes` does, by `recall_by`."""
    masks = detections.masks if detections.recall_by == "segm" else None
    return match_boxes(truth, detections.image_ids, detections.boxes, detections.scores, areas, limits, masks)


def average_precision(
    truth: dict[str, Any],
    detections: DetectionSet,
    categories: Sequence[dict[str, Any]],
    area_bounds: tuple[float, float] = (32**2, 96**2),
    limit: int = 100,
    engine: Engine = "faster-coco-eval",
    by: By = "bbox",
) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """Compute AP over all images of `truth`, and AP of each category; arguments as in `average_recall`.

    Args:
        categories: of the data set; position k is label k + 1.
        limit: number of best detections that count per image and category, as in COCO.
        by: "segm" compares masks.

    Returns:
        {"AP": ..., "AP50": ..., "AP75": ..., "AP_s": ..., "AP_m": ..., "AP_l": ...} and {category's name: AP} in 0..1; None
        without objects. A category without objects does not count in the mean, as in COCO. Names that are not unique have
        the id added.
    """
    evaluation = _accumulated(truth, detections, categories, area_bounds, [limit], engine, by)
    params = evaluation.params
    precision = evaluation.eval["precision"][..., 0]  # (IoU thresholds, recall thresholds, K, areas); -1: no object
    position = {int(key): k for k, key in enumerate(params.catIds)}  # the evaluator sorts by id
    per_class = {
        name: mean(precision[:, :, position[category["id"]], 0])
        for name, category in zip(unique_names(categories), categories, strict=True)
    }
    return precision_by_size(precision, params.iouThrs), per_class


def precision_by_size(precision: np.ndarray, thresholds: np.ndarray) -> dict[str, float | None]:
    """Compute AP, AP50, AP75 and AP by size from COCOeval's precision: (IoU thresholds, recall thresholds, K, areas)."""
    metrics = {"AP": mean(precision[..., 0])}
    for name, threshold in (("AP50", 0.5), ("AP75", 0.75)):
        metrics[name] = mean(precision[np.isclose(thresholds, threshold), :, :, 0])
    for a, area in enumerate(AREAS[1:], start=1):
        metrics["AP" + SUFFIX[area]] = mean(precision[..., a])
    return metrics


def mask_name(name: str) -> str:
    """Return the name of a metric of boxes where masks are compared: mask_AP50, ..."""
    return f"mask_{name}"


def proposal_name(name: str) -> str:
    """Return the name of a recall of proposals where detections are evaluated too: proposal_AR1k, ..."""
    return f"proposal_{name}"


def recall_name(limit: int, area: str) -> str:
    """Format a metric's name: AR100, AR1k_s, ..."""
    return (f"AR{limit // 1000}k" if limit % 1000 == 0 else f"AR{limit}") + SUFFIX[area]


def _accumulated(
    truth: dict[str, Any],
    detections: DetectionSet,
    categories: Sequence[dict[str, Any]] | None,
    area_bounds: tuple[float, float],
    limits: Sequence[int],
    engine: Engine,
    by: By,
) -> Any:
    """Return a COCOeval that has accumulated, for the areas of AREAS and for `limits` in rising order."""
    evaluation = evaluator(truth, detections, categories, area_ranges(area_bounds), limits, engine, by)
    with quietly():
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def area_ranges(area_bounds: tuple[float, float]) -> list[tuple[float, float]]:
    """Return the ranges of AREAS in square pixels; both ends belong to a range, as in COCO."""
    small, large = area_bounds
    return [(0, 1e10), (0, small), (small, large), (large, 1e10)]


def evaluator(
    truth: dict[str, Any],
    detections: DetectionSet,
    categories: Sequence[dict[str, Any]] | None,
    areas: Sequence[tuple[float, float]],
    limits: Sequence[int],
    engine: Engine = "faster-coco-eval",
    by: By = "bbox",
) -> Any:
    """Build a COCOeval that has not evaluated yet, for these areas and for `limits` in rising order.

    Without `categories` the evaluation is class-agnostic: everything is of one category. Read its arrays, not `summarize`,
    which assumes limits of its own that differ between engines.
    """
    if engine == "faster-coco-eval":
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval
    else:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

    results = detections.coco_results(categories, image_sizes(truth) if by == "segm" else None)
    if by == "segm":
        areas_of = rle.coco_areas([result["segmentation"] for result in results])
        results = [{**result, "area": area} for result, area in zip(results, areas_of.tolist(), strict=True)]
    entries = truth["annotations"], results
    with quietly():
        evaluation = COCOeval(*(_indexed(COCO(), truth["images"], categories, annotations) for annotations in entries), by)
    evaluation.params.maxDets = sorted(limits)
    evaluation.params.areaRng = [list(area) for area in areas]
    evaluation.params.areaRngLbl = [f"{low:g} to {high:g}" for low, high in areas]
    return evaluation


def _indexed(coco: Any, images: Any, categories: Sequence[dict[str, Any]] | None, annotations: list[dict[str, Any]]) -> Any:
    """Fill and index a COCO object. Annotation ids start at 1, since COCOeval reads the id 0 as "unmatched"."""
    category = {"category_id": 1} if categories is None else {}
    annotations = [
        {"iscrowd": 0, **({} if "area" in a else {"area": a["bbox"][2] * a["bbox"][3]}), **a, **category, "id": i}
        for i, a in enumerate(annotations, start=1)
    ]
    declared = [{"id": 1, "name": "object"}] if categories is None else list(categories)
    coco.dataset = {"images": images, "categories": declared, "annotations": annotations}
    coco.createIndex()
    return coco


@contextmanager
def quietly() -> Iterator[None]:
    """Suppress the progress messages that pycocotools prints."""
    with redirect_stdout(io.StringIO()):
        yield


def mean(values: np.ndarray) -> float | None:
    """Average the defined values; None without any (COCOeval marks undefined values by -1)."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else None


def unique_names(categories: Sequence[dict[str, Any]]) -> list[str]:
    """Return the categories' names, with the id added if several share a name."""
    names = [category["name"] for category in categories]
    return [n if names.count(n) == 1 else f"{n} (id {c['id']})" for n, c in zip(names, categories, strict=True)]

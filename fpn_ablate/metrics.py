"""Average recall of proposals (Sec. 5.1): class-agnostic, averaged over IoU .50:.05:.95, as COCO's evaluator computes it."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

Engine = Literal["faster-coco-eval", "pycocotools"]
AREAS = ("all", "small", "medium", "large")
SUFFIX = {"all": "", "small": "_s", "medium": "_m", "large": "_l"}


@dataclass(frozen=True)
class Detections:
    """Boxes of many images in native pixels: image_ids (M,) int64, boxes (M, 4) XYXY float32, scores (M,) float32."""

    image_ids: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray

    def save(self, path: Path) -> None:
        np.savez_compressed(path, image_ids=self.image_ids, boxes=self.boxes, scores=self.scores)

    @staticmethod
    def load(path: Path) -> "Detections":
        with np.load(path, allow_pickle=False) as data:
            return Detections(data["image_ids"], data["boxes"], data["scores"])

    def coco_results(self) -> list[dict[str, Any]]:
        """As a COCO results list; every box has category 1, since nobody asks for it."""
        boxes = self.boxes.astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        return [
            {"image_id": int(i), "category_id": 1, "bbox": b, "score": float(s)}
            for i, b, s in zip(self.image_ids, boxes.tolist(), self.scores, strict=True)
        ]


def evaluator_name(engine: Engine = "faster-coco-eval") -> str:
    return f"{engine} {version(engine)}"


def average_recall(
    truth: dict[str, Any],
    detections: Detections,
    area_bounds: tuple[float, float] = (32**2, 96**2),
    limits: Sequence[int] = (100, 1000),
    engine: Engine = "faster-coco-eval",
) -> dict[str, float | None]:
    """AR at the best `limits` proposals an image, over all images of `truth`, by size of the object.

    Args:
        truth: a COCO instances dictionary. Crowd regions are ignored, as COCO does.
        area_bounds: where small ends and where large begins, in square pixels of `truth`.

    Returns:
        {"AR100": ..., "AR100_s": ..., ..., "AR1k_l": ...} in 0..1; None where no object of that size exists.
    """
    if engine == "faster-coco-eval":
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval
    else:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

    ground_truth = COCO()
    ground_truth.dataset = {
        "images": truth["images"],
        "categories": [{"id": 1, "name": "object"}],
        # COCOeval takes the annotation id 0 for "unmatched", so the ids are counted anew from 1.
        "annotations": [
            {**a, "id": i, "category_id": 1, "area": a.get("area", a["bbox"][2] * a["bbox"][3])}
            for i, a in enumerate(truth["annotations"], start=1)
        ],
    }
    ground_truth.createIndex()
    results = COCO()
    results.dataset = {
        "images": truth["images"],
        "categories": [{"id": 1, "name": "object"}],
        "annotations": [
            {**d, "id": i, "area": d["bbox"][2] * d["bbox"][3], "iscrowd": 0}
            for i, d in enumerate(detections.coco_results(), start=1)
        ],
    }
    results.createIndex()
    small, large = area_bounds
    evaluation = COCOeval(ground_truth, results, "bbox")
    evaluation.params.useCats = 0
    # pycocotools' own summary wants three limits; `summarize` is never called here, the array is read below.
    evaluation.params.maxDets = [1, *sorted(limits)]
    evaluation.params.areaRng = [[0, 1e10], [0, small], [small, large], [large, 1e10]]
    evaluation.params.areaRngLbl = list(AREAS)
    _quietly(evaluation)
    recall = evaluation.eval["recall"]  # (IoU thresholds, 1, areas, limits); -1 where there is nothing to recall
    found: dict[str, float | None] = {}
    for m, limit in enumerate(sorted(limits), start=1):
        name = f"AR{limit // 1000}k" if limit % 1000 == 0 else f"AR{limit}"
        for a, area in enumerate(AREAS):
            values = recall[:, 0, a, m]
            found[name + SUFFIX[area]] = float(values.mean()) if (values > -1).all() else None
    return found


def _quietly(evaluation: Any) -> None:
    """Evaluate without the progress messages that pycocotools prints."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()

"""Diagnose detections: errors by kind, precision-recall curves, recall by IoU, and how far scores are probabilities.

All are of boxes (recall by IoU: of masks for proposals that have them). Proposals without labels count as one class.

D detections and G objects of an image, M detections of all images, K classes, T IoU thresholds.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from fpn_ablate.evaluation.coco import DetectionSet, area_ranges, evaluator, match, quietly

LIMIT = 100  # best detections of an image that count
FOREGROUND, BACKGROUND = 0.5, 0.1  # IoU: a match from the first on, background up to the second
# The kinds of TIDE (Bolya et al., ECCV 2020), in its order.
ERRORS = ("localisation", "class", "duplicate", "background", "class and localisation", "missed")
LOCALISATION, CLASS, DUPLICATE, BACKGROUND_ERROR, BOTH, MISSED = range(6)
CORRECT = -1
CURVES = (0.5, 0.75)  # IoU thresholds of the precision-recall curves; the last curve is the mean of .50:.05:.95
BINS = 10  # of the score
RECALLS = np.linspace(0, 1, 101)


def diagnose(
    truth: dict[str, Any], detections: DetectionSet, categories: Sequence[dict[str, Any]], area_bounds: tuple[float, float]
) -> dict[str, np.ndarray]:
    """Diagnose the detections of a run; the arguments are those of `average_precision`.

    Returns:
        recall_by_iou: (4, T) recall of the best 100 by size of the object (AREAS), NaN without objects.
        precision: (3, 101) precision at recall 0, .01, ..., 1 at IoU .50, .75 and averaged over .50:.05:.95; mean over classes.
        errors, error_counts: (6,) what fixing all errors of each kind (ERRORS) would add to AP50, and their number.
        calibration: (BINS, 3) detections, correct ones (IoU .50) and the sum of their scores, by bin of the score.
    """
    classes = None if detections.labels is None else categories
    areas = area_ranges(area_bounds)
    matches = match(truth, detections, areas, (LIMIT,))
    objects = matches.objects.sum(0)[:, None]
    matched = matches.matched[:, 0].sum(0)
    evaluation = evaluator(truth, detections, classes, areas[:1], [LIMIT])
    with quietly():
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][..., 0, 0]  # (T, 101, K); -1 without objects
    precision = precision[..., (precision > -1).all((0, 1))]
    if not precision.shape[-1]:
        precision = np.full((*precision.shape[:2], 1), np.nan)
    at = [int(np.argmin(np.abs(evaluation.params.iouThrs - iou))) for iou in CURVES]
    images = MatchedDetections(truth, detections, classes)
    return {
        "recall_by_iou": np.divide(matched, objects, out=np.full(matched.shape, np.nan), where=objects > 0),
        "precision": np.stack([*(precision[t].mean(-1) for t in at), precision.mean((0, 2))]).astype(np.float32),
        "errors": images.fixed_gains(),
        "error_counts": images.counts(),
        "calibration": images.calibration(),
    }


class MatchedDetections:
    """Detections of all images, matched at IoU .5 and sorted into TIDE's kinds.

    A detection that matches no object is a localisation error if an object of its class overlaps it by .1 to .5, a class error
    if an object of another class overlaps it by at least .5, a duplicate if its object has a better match, background if
    nothing overlaps it by more than .1, and else wrong in class and localisation. An object is missed if no detection matches
    it, and no class or localisation error would if it were fixed. Detections in crowds of their class are left out.

    Attributes:
        labels, scores, kinds: (M,); `kinds` is CORRECT or an index of ERRORS.
        fixed: (M,) the label of the object that a fixed error would match, 0 if it would just vanish.
        objects, missed: (K + 1,) counts by label.
    """

    def __init__(self, truth: dict[str, Any], detections: DetectionSet, categories: Sequence[dict[str, Any]] | None) -> None:
        number = {category["id"]: k for k, category in enumerate(categories or (), start=1)}
        size = max(len(number), 1) + 1
        self.objects, self.missed = np.zeros(size, int), np.zeros(size, int)
        by_image: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in truth["images"]}
        for annotation in truth["annotations"]:
            by_image.get(annotation["image_id"], []).append(annotation)
        labels = np.ones(len(detections.scores), int) if categories is None else np.asarray(detections.labels)
        order = np.lexsort((-detections.scores, detections.image_ids))
        ids = detections.image_ids[order]
        columns = []
        for image, annotations in by_image.items():
            first, last = np.searchsorted(ids, image), np.searchsorted(ids, image, side="right")
            chosen = order[first : min(last, first + LIMIT)]
            of_objects = np.array([number.get(a["category_id"], 1) for a in annotations], int)
            crowd = np.array([bool(a.get("iscrowd")) for a in annotations], bool)
            boxes = np.array([a["bbox"] for a in annotations], float).reshape(-1, 4)
            columns.append(
                self._image(boxes, of_objects, crowd, detections.boxes[chosen], labels[chosen], detections.scores[chosen])
            )
        self.labels, self.scores, self.kinds, self.fixed = (np.concatenate(c) for c in zip(*columns, strict=True))

    def _image(
        self,
        objects: np.ndarray,
        of_objects: np.ndarray,
        crowd: np.ndarray,
        boxes: np.ndarray,
        labels: np.ndarray,
        scores: np.ndarray,
    ) -> tuple[np.ndarray, ...]:
        """Match an image: objects (G, 4) XYWH, detections (D, 4) XYXY, best first; return labels, scores, kinds, `fixed`."""
        xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).astype(float)
        overlaps = np.zeros((len(boxes), len(objects)))
        if overlaps.size:
            overlaps = coco_mask.iou(xywh, objects, crowd.astype(np.uint8).tolist())
        ignored = ((overlaps > FOREGROUND) & crowd & (labels[:, None] == of_objects)).any(1)
        iou, of_objects = overlaps[:, ~crowd], of_objects[~crowd]
        np.add.at(self.objects, of_objects, 1)
        own_class = labels[:, None] == of_objects
        own, other = iou * own_class, iou * ~own_class
        if not len(of_objects):  # so that a maximum is defined
            own = other = iou = np.zeros((len(labels), 1))
        free, correct = own.copy(), np.zeros(len(labels), bool)
        used = np.zeros(own.shape[1], bool)
        for d in np.flatnonzero(own.max(1) >= FOREGROUND):
            g = int(free[d].argmax())
            if free[d, g] >= FOREGROUND:
                correct[d] = used[g] = True
                free[:, g] = 0
        nearest = own.max(1)
        kinds = np.select(
            [
                correct,
                (nearest >= BACKGROUND) & (nearest <= FOREGROUND),
                other.max(1) >= FOREGROUND,
                (own * used).max(1) >= FOREGROUND,
                iou.max(1) <= BACKGROUND,
            ],
            [CORRECT, LOCALISATION, CLASS, DUPLICATE, BACKGROUND_ERROR],
            BOTH,
        )
        kept = correct | ~ignored
        # An error fixes an object that nothing matches, and of several the one of the best score does.
        fixed, claimed = np.zeros(len(labels), int), np.zeros(len(used), bool)
        for d in np.flatnonzero(kept & np.isin(kinds, (LOCALISATION, CLASS))):
            g = int((own if kinds[d] == LOCALISATION else other)[d].argmax())
            if not used[g] and not claimed[g]:
                claimed[g] = True
                fixed[d] = of_objects[g]
        unmatched = ~(used | claimed)[: len(of_objects)]
        np.add.at(self.missed, of_objects[unmatched], 1)
        return labels[kept], scores[kept], kinds[kept], fixed[kept]

    def counts(self) -> np.ndarray:
        """Return the number of errors of each kind (6,)."""
        return np.array([*((self.kinds == kind).sum() for kind in range(MISSED)), self.missed.sum()])

    def fixed_gains(self) -> np.ndarray:
        """Return what fixing each kind of error adds to AP50 (6,): never less than 0, NaN without objects."""
        before, gains = self._precision(self.labels, self.kinds == CORRECT, self.objects), []
        for kind in range(MISSED):
            wrong = self.kinds == kind
            labels = np.where(wrong, self.fixed, self.labels)
            correct = (self.kinds == CORRECT) | (wrong & (labels > 0))
            gains.append(self._precision(labels, correct, self.objects) - before)
        gains.append(self._precision(self.labels, self.kinds == CORRECT, self.objects - self.missed) - before)
        return np.maximum(gains, 0).astype(np.float32)

    def _precision(self, labels: np.ndarray, correct: np.ndarray, objects: np.ndarray) -> float:
        """Return AP at 101 recalls as COCO interpolates it, mean over the classes with objects; label 0 is left out."""
        values = []
        for label in np.flatnonzero(objects):
            chosen = labels == label
            ranked = correct[chosen][np.argsort(-self.scores[chosen], kind="stable")]
            found = ranked.cumsum()
            precision = np.maximum.accumulate((found / np.arange(1, len(found) + 1))[::-1])[::-1]
            at = np.searchsorted(found / objects[label], RECALLS, side="left")
            values.append(np.append(precision, 0)[np.minimum(at, len(found))].mean())
        return float(np.mean(values)) if values else np.nan

    def calibration(self) -> np.ndarray:
        """Return the detections, the correct ones and the sum of the scores, by bin of the score: (BINS, 3)."""
        bins = np.clip((self.scores * BINS).astype(int), 0, BINS - 1)
        columns = (np.ones(len(bins)), self.kinds == CORRECT, self.scores)
        return np.stack([np.bincount(bins, weights, BINS) for weights in columns], 1)

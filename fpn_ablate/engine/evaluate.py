"""What a trained row finds, in native pixels, and the truth that it is held against."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fpn_ablate.config.schema import Recipe
from fpn_ablate.data.loader import evaluation_batches
from fpn_ablate.data.transforms import Resize, to_native
from fpn_ablate.engine.train import autocast
from fpn_ablate.evaluation.coco import DetectionSet, average_precision, average_recall
from fpn_ablate.model.detectors.two_stage import Detector
from fpn_ablate.structures.batch import Batch, DetectionDataset
from fpn_ablate.structures.instances import BatchDetections, Proposals
from fpn_ablate.utils.hashing import digest


@torch.no_grad()
def predict(
    predictor: Callable[[Batch], Proposals | BatchDetections],
    dataset: DetectionDataset,
    recipe: Recipe,
    device: torch.device,
    *,
    workers: int = 0,
    count: int | None = None,
) -> DetectionSet:
    """What `predictor` finds in every image of `dataset`, or in its first `count`; native pixels, best first within an image."""
    native = {image["id"]: (image["height"], image["width"]) for image in dataset.coco()["images"]}
    batches = evaluation_batches(
        dataset,
        batch_size=recipe.eval_batch_size,
        resize=Resize.of(recipe),
        workers=workers,
        count=count,
    )
    ids, boxes, scores, labels = [], [], [], []
    for batch in batches:
        batch = batch.to(device)
        with autocast(recipe.bf16, device):
            found = predictor(batch)
        for n, image_id in enumerate(batch.image_ids):
            keep = found.valid[n]
            own = to_native(found.boxes[n][keep].cpu(), batch.sizes[n].tolist(), native[image_id])
            ids.append(np.full(len(own), image_id, np.int64))
            boxes.append(own.numpy().astype(np.float32))
            scores.append(found.scores[n][keep].cpu().numpy().astype(np.float32))
            if isinstance(found, BatchDetections):
                labels.append(found.labels[n][keep].cpu().numpy())
    return DetectionSet(
        np.concatenate(ids), np.concatenate(boxes), np.concatenate(scores), np.concatenate(labels) if labels else None
    )


def propose(
    model: Detector,
    dataset: DetectionDataset,
    recipe: Recipe,
    device: torch.device,
    *,
    workers: int = 0,
    count: int | None = None,
    to_train: bool = False,
) -> DetectionSet:
    """Proposals for every image of `dataset`, or for its first `count`; `to_train`: as many as a second stage is trained on."""
    model.eval()

    def proposals(batch: Batch) -> Proposals:
        return model.propose(batch.images, batch.sizes, to_train)

    return predict(proposals, dataset, recipe, device, workers=workers, count=count)


def ground_truth(dataset: DetectionDataset, count: int | None) -> dict:
    """The ground truth to evaluate against: all declared images, whether anything was found in them or not."""
    truth = dataset.coco()
    if count is None or count >= len(truth["images"]):
        return truth
    kept = {image["id"] for image in truth["images"][:count]}
    annotations = [a for a in truth["annotations"] if a["image_id"] in kept]
    return {**truth, "images": truth["images"][:count], "annotations": annotations}


def evaluate(found: DetectionSet, dataset: DetectionDataset, count: int | None = None) -> dict[str, Any]:
    """The evaluated part of a record: recall of proposals, or precision and recall of detections; and on what images."""
    truth = ground_truth(dataset, count)
    metrics, more = average_recall(truth, found, dataset.area_bounds), {}
    if found.labels is not None:
        metrics = {name: value for name, value in metrics.items() if name.startswith("AR100")}
        precision, more["per_class"] = average_precision(truth, found, dataset.categories, dataset.area_bounds)
        metrics = precision | metrics
    return {
        "metrics": metrics,
        **more,
        "objects": object_sizes(truth, dataset.area_bounds),
        "images": {
            "count": len(truth["images"]),
            "declared": len(dataset),
            "digest": digest([image["id"] for image in truth["images"]]),
        },
    }


def object_sizes(truth: dict[str, Any], bounds: tuple[float, float]) -> dict[str, int]:
    """Objects by size as COCO's evaluator sorts them (one exactly on a bound counts on both sides); crowds left out."""
    areas = [a.get("area", a["bbox"][2] * a["bbox"][3]) for a in truth["annotations"] if not a.get("iscrowd")]
    low, high = bounds
    return {
        "small": sum(area <= low for area in areas),
        "medium": sum(low <= area <= high for area in areas),
        "large": sum(area >= high for area in areas),
    }

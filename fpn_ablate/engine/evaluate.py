"""Inference over a data set and its evaluation, in pixels of the native images."""

from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import torch

from fpn_ablate.config.schema import Recipe
from fpn_ablate.data.loader import evaluation_batches
from fpn_ablate.data.transforms import Resize, to_native
from fpn_ablate.engine.distributed import ALONE, Ranks
from fpn_ablate.engine.train import autocast
from fpn_ablate.evaluation.coco import DetectionSet, average_precision, average_recall, mask_name, proposal_name
from fpn_ablate.model.detectors.two_stage import Detector
from fpn_ablate.structures.batch import Batch, DetectionDataset
from fpn_ablate.structures.instances import BatchDetections, Proposals, map_tensors
from fpn_ablate.structures.masks import paste
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
    mask_threshold: float = 0.5,
    ranks: Ranks = ALONE,
) -> DetectionSet:
    """Run `predictor` on all images of `dataset`, or on the first `count`; `ranks` share the batches, and get all detections.

    Boxes are in native pixels, best first per image; masks are pasted into the native images, where they are above
    `mask_threshold`.
    """
    native_sizes = {image["id"]: (image["height"], image["width"]) for image in dataset.coco()["images"]}
    batches = evaluation_batches(
        dataset,
        batch_size=recipe.eval_batch_size,
        resize=Resize.of(recipe),
        workers=workers,
        count=count,
        ranks=(ranks.rank, ranks.size),
    )
    by_batch = []
    for batch in batches:
        with autocast(recipe.bf16, device):
            predictions = predictor(batch.to(device))
        # One wait for the GPU a batch: each copy would be one, and each boolean index there.
        predictions = map_tensors(predictions, lambda x: x.to("cpu", non_blocking=True))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ids, boxes, scores, labels, masks = [], [], [], [], []
        for n, (image_id, size) in enumerate(zip(batch.image_ids, batch.sizes.tolist(), strict=True)):
            valid = predictions.valid[n]
            native_boxes = to_native(predictions.boxes[n][valid], size, native_sizes[image_id])
            ids.append(np.full(len(native_boxes), image_id, np.int64))
            boxes.append(native_boxes.numpy().astype(np.float32))
            scores.append(predictions.scores[n][valid].numpy().astype(np.float32))
            if isinstance(predictions, BatchDetections):
                labels.append(predictions.labels[n][valid].numpy())
            if predictions.masks is not None:
                masks.append(paste(predictions.masks[n][valid], native_boxes.float(), native_sizes[image_id], mask_threshold))
        by_batch.append((ids, boxes, scores, labels, masks))
    ids, boxes, scores, labels, masks = (list(chain.from_iterable(x)) for x in zip(*ranks.gather(by_batch), strict=True))
    return DetectionSet(
        np.concatenate(ids),
        np.concatenate(boxes),
        np.concatenate(scores),
        np.concatenate(labels) if labels else None,
        list(chain.from_iterable(masks)) if masks else None,
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
    ranks: Ranks = ALONE,
) -> DetectionSet:
    """Propose on all images of `dataset`, or on the first `count`; `to_train`: as many as a second stage is trained on."""
    model.eval()

    def proposals(batch: Batch) -> Proposals:
        return model.propose(batch.images, batch.sizes, to_train)

    return predict(proposals, dataset, recipe, device, workers=workers, count=count, ranks=ranks)


def ground_truth(dataset: DetectionDataset, count: int | None) -> dict:
    """Return the ground truth of all declared images, or of the first `count`; images without detections count as well."""
    truth = dataset.coco()
    if count is None or count >= len(truth["images"]):
        return truth
    ids = {image["id"] for image in truth["images"][:count]}
    annotations = [a for a in truth["annotations"] if a["image_id"] in ids]
    return {**truth, "images": truth["images"][:count], "annotations": annotations}


def evaluate(
    detections: DetectionSet, dataset: DetectionDataset, count: int | None = None, proposals: DetectionSet | None = None
) -> dict[str, Any]:
    """Evaluate on all images of `dataset`, or on the first `count`: AR of proposals, AP and AR100 of labelled detections.

    Proposals with masks are evaluated by their masks, detections with masks by their boxes and, as mask_AP, by their masks.

    Args:
        proposals: of the same network, if their recall is evaluated beside its detections, as proposal_AR100, ...

    Returns:
        The evaluated keys of a record: metrics, per_class (of labelled detections), objects, images.
    """
    truth = ground_truth(dataset, count)
    metrics, per_class = average_recall(truth, detections, dataset.area_bounds), {}
    if detections.labels is not None:
        metrics = {name: value for name, value in metrics.items() if name.startswith("AR100")}
        precision, of_classes = average_precision(truth, detections, dataset.categories, dataset.area_bounds)
        metrics, per_class = precision | metrics, {"per_class": of_classes}
        if detections.masks is not None:
            precision, of_classes = average_precision(truth, detections, dataset.categories, dataset.area_bounds, by="segm")
            metrics |= {mask_name(name): value for name, value in precision.items()}
            per_class["mask_per_class"] = of_classes
    if proposals is not None:
        recall = average_recall(truth, proposals, dataset.area_bounds)
        metrics |= {proposal_name(name): value for name, value in recall.items()}
    return {
        "metrics": metrics,
        **per_class,
        "objects": object_sizes(truth, dataset.area_bounds),
        "images": {
            "count": len(truth["images"]),
            "declared": len(dataset),
            "digest": digest([image["id"] for image in truth["images"]]),
        },
    }


def object_sizes(truth: dict[str, Any], bounds: tuple[float, float]) -> dict[str, int]:
    """Count objects by size as COCO's evaluator does, without crowds; an object exactly on a bound counts on both sides."""
    areas = [a.get("area", a["bbox"][2] * a["bbox"][3]) for a in truth["annotations"] if not a.get("iscrowd")]
    low, high = bounds
    return {
        "small": sum(area <= low for area in areas),
        "medium": sum(low <= area <= high for area in areas),
        "large": sum(area >= high for area in areas),
    }

"""Artifacts of a finished run: what the report shows beside its figures, made from saved detections and weights.

- `resampled.npz` in the run's folder: metrics on bootstrap samples of the images, for intervals.
- `artifacts.npz` there: the metric of each image, the diagnosis of the detections (`evaluation.diagnosis`), and what
  `runs.pyramid.inspect_pyramid` returns.
- In the record: `by_size`, `pictures`, `draws`.
- `<out>/runs/.pictures/<pictures>/`, once for all runs on the same images: thumbnails, ground truth in `truth.json`, and if a
  run has masks, its masks in `masks.json`.

`python -m fpn_ablate artifacts results/runs` makes them again on any machine; only what the network computes
needs the device of the run.
"""

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fpn_ablate.engine.evaluate import ground_truth
from fpn_ablate.evaluation.bootstrap import FEW_REPLICATES, bootstrap_indices, bootstrap_metrics, per_image_metrics
from fpn_ablate.evaluation.coco import DetectionSet, match
from fpn_ablate.evaluation.diagnosis import diagnose
from fpn_ablate.store.bootstrap_store import save
from fpn_ablate.structures.batch import DetectionDataset
from fpn_ablate.utils.files import refuse_links_out, save_text, write_atomically
from fpn_ablate.utils.paths import ARTIFACTS, PICTURES, RESAMPLED, TRUE_MASKS, TRUTH

THUMBNAILS = 200  # images
THUMBNAIL_SIDE = 320  # pixels at most


def make_artifacts(
    folder: Path,
    dataset: DetectionDataset,
    detections: DetectionSet,
    count: int | None,
    inspected: dict[str, np.ndarray],
    proposals: DetectionSet | None = None,
) -> dict[str, Any]:
    """Write the artifacts of a run, and return the keys that its record gets.

    Args:
        folder: of the run, four levels below <out>/runs.
        dataset, detections, count: the split that the run was evaluated on, or its first `count` images; the detections there.
        inspected: from `runs.pyramid.inspect_pyramid`; empty if the network cannot be restored.
        proposals: on the same images, if their recall is evaluated beside the detections.

    Raises:
        UserError: a file cannot be written.
    """
    truth = ground_truth(dataset, count)
    generator = np.random.default_rng(int(dataset.digest[:16], 16))  # the same samples for all rows
    indices = bootstrap_indices(len(truth["images"]), generator)
    resampled = bootstrap_metrics(truth, detections, dataset.categories, dataset.area_bounds, indices, proposals)
    write_atomically(folder / RESAMPLED, partial(save, replicates=resampled))
    ids, values = per_image_metrics(truth, detections, dataset.categories)
    arrays = diagnose(truth, detections, dataset.categories, dataset.area_bounds) | inspected
    write_atomically(folder / ARTIFACTS, lambda path: np.savez_compressed(path, image_ids=ids, values=values, **arrays))
    name = f"{dataset.digest[:16]}-{len(ids)}"
    runs = folder.resolve().parents[3]
    refuse_links_out(runs, runs / PICTURES / name)
    _save_thumbnails(runs / PICTURES / name, dataset, truth)
    if detections.masks is not None:
        _save_masks(runs / PICTURES / name, truth)
    draws = hashlib.sha256(np.append(ids, indices[:FEW_REPLICATES]).astype("<i8").tobytes()).hexdigest()[:16]
    return {"by_size": recall_by_size(truth, detections, dataset.area_bounds), "pictures": name, "draws": draws}


def recall_by_size(truth: dict[str, Any], detections: DetectionSet, area_bounds: tuple[float, float]) -> dict[str, list]:
    """Compute class-agnostic AR@100 in bins of object size, by masks for proposals that have them.

    Returns:
        {"edges": E sides in pixels (roots of areas), rising by sqrt(2), "objects": E + 1 counts, "AR100": E + 1 values, None
        without objects}. The first and the last bin are open; an object on an edge counts on both sides, as in COCO.
    """
    small, large = (bound**0.5 for bound in area_bounds)
    first, last = (round(2 * np.log2(side / small)) for side in (small / 4, large * 2))
    edges = [small * 2 ** (k / 2) for k in range(first, last + 1)]
    ranges = list(zip([0, *(edge**2 for edge in edges)], [*(edge**2 for edge in edges), 1e10], strict=True))
    matches = match(truth, detections, ranges, (100,))
    values = [None if np.isnan(value) else float(value) for value in matches.recall()[0]]
    return {"edges": [round(edge, 2) for edge in edges], "objects": matches.objects.sum(0).tolist(), "AR100": values}


def _save_thumbnails(folder: Path, dataset: DetectionDataset, truth: dict[str, Any]) -> None:
    """Save thumbnails of the first images and their ground truth, unless they exist."""
    if (folder / TRUTH).exists():
        return
    images = truth["images"][:THUMBNAILS]
    for position, image in enumerate(images):
        sample = dataset[position]
        assert sample.image_id == image["id"]
        picture = Image.fromarray(sample.image)
        picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        write_atomically(folder / f"{image['id']}.jpg", partial(picture.save, quality=82))
    entries = {image["id"]: {"width": image["width"], "height": image["height"], "objects": []} for image in images}
    names = {category["id"]: category["name"] for category in dataset.categories}
    for annotation in truth["annotations"]:
        if annotation["image_id"] in entries:
            entry = {"bbox": annotation["bbox"], "category": names[annotation["category_id"]]}
            entries[annotation["image_id"]]["objects"].append(entry | ({"crowd": True} if annotation.get("iscrowd") else {}))
    content = {"categories": [category["name"] for category in dataset.categories], "images": entries}
    save_text(folder / TRUTH, json.dumps(content))


def _save_masks(folder: Path, truth: dict[str, Any]) -> None:
    """Save the masks of the objects of the first images, in the order of `truth.json`, unless they exist."""
    if (folder / TRUE_MASKS).exists():
        return
    masks: dict[int, list[str]] = {image["id"]: [] for image in truth["images"][:THUMBNAILS]}
    for annotation in truth["annotations"]:
        if annotation["image_id"] in masks:
            masks[annotation["image_id"]].append(annotation["segmentation"]["counts"])
    save_text(folder / TRUE_MASKS, json.dumps(masks))

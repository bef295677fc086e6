"""What a report shows of a finished run beyond its figures, from its saved detections and its weights.

`python -m fpn_ablate artifacts results/runs` makes all of it again, on any machine, but for what the levels hold, which takes
the device that the run was made on. Below the run:
`resampled.npz` (its metrics on images drawn anew, for intervals) and `artifacts.npz` (each image's own figure, and what the
levels of the pyramid hold); in its record `by_size`, `pictures` and `draws`; and once for all runs on the same images,
`<out>/runs/.pictures/<pictures>/`: small copies of the images with their ground truth in `truth.json`.
"""

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fpn_ablate.config.schema import Recipe
from fpn_ablate.data.loader import evaluation_batches
from fpn_ablate.data.transforms import Resize
from fpn_ablate.engine.evaluate import ground_truth
from fpn_ablate.engine.train import autocast
from fpn_ablate.evaluation.bootstrap import FEW, bootstrap_indices, bootstrap_metrics, per_image_metrics
from fpn_ablate.evaluation.coco import DetectionSet
from fpn_ablate.evaluation.recall import hits
from fpn_ablate.model.detectors.two_stage import Detector
from fpn_ablate.store.bootstrap_store import RESAMPLED, save
from fpn_ablate.structures.batch import DetectionDataset
from fpn_ablate.utils.files import save_text, write_atomically
from fpn_ablate.utils.paths import ARTIFACTS, PICTURES, TRUTH

SHOWN = 200  # images of which a small copy is kept
SIDE = 320  # pixels at most


def make_artifacts(
    folder: Path, dataset: DetectionDataset, found: DetectionSet, count: int | None, levels: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Write the files of a run, and return what goes into its record.

    Args:
        folder: of the run, three levels below <out>/runs.
        dataset: the split that it was evaluated on; `found`: what it found there.
        levels: as `energy` gives them; empty where the network is out of reach.

    Raises:
        UserError: the disk does not take them.
    """
    truth = ground_truth(dataset, count)
    generator = np.random.default_rng(int(dataset.digest[:16], 16))  # the same images for every row
    drawn = bootstrap_indices(len(truth["images"]), generator)
    resampled = bootstrap_metrics(truth, found, dataset.categories, dataset.area_bounds, drawn)
    write_atomically(folder / RESAMPLED, partial(save, replicates=resampled))
    ids, values = per_image_metrics(truth, found, dataset.categories)
    shown = {f"level_{name}": level for name, level in levels.items()}
    write_atomically(folder / ARTIFACTS, lambda path: np.savez_compressed(path, image_ids=ids, values=values, **shown))
    name = f"{dataset.digest[:16]}-{len(ids)}"
    _save_thumbnails(folder.resolve().parents[3] / PICTURES / name, dataset, truth)
    drawn_of = hashlib.sha256(np.append(ids, drawn[:FEW]).astype("<i8").tobytes()).hexdigest()[:16]
    return {"by_size": by_size(truth, found, dataset.area_bounds), "pictures": name, "draws": drawn_of}


def by_size(truth: dict[str, Any], found: DetectionSet, area_bounds: tuple[float, float]) -> dict[str, list]:
    """Class-agnostic AR@100 by the size of the object.

    Returns:
        {"edges": E sides in pixels (roots of areas), rising by sqrt(2), "objects": E + 1 counts, "AR100": E + 1 values, None
        without objects}. The first and the last bin are open; an object on an edge counts on both sides, as in COCO.
    """
    small, large = (bound**0.5 for bound in area_bounds)
    first, last = (round(2 * np.log2(side / small)) for side in (small / 4, large * 2))
    edges = [small * 2 ** (k / 2) for k in range(first, last + 1)]
    ranges = list(zip([0, *(edge**2 for edge in edges)], [*(edge**2 for edge in edges), 1e10], strict=True))
    each = hits(truth, found.image_ids, found.boxes, found.scores, ranges, (100,))
    values = [None if np.isnan(value) else float(value) for value in each.recall()[0]]
    return {"edges": [round(edge, 2) for edge in edges], "objects": each.objects.sum(0).tolist(), "AR100": values}


@torch.no_grad()
def activation_maps(model: Detector, dataset: DetectionDataset, recipe: Recipe, device: torch.device) -> dict[str, np.ndarray]:
    """{level: (h, w) uint8}: the mean absolute activation over the channels of each of the neck's levels, for the first image,
    from nothing to the level's own greatest."""
    batch = next(evaluation_batches(dataset, resize=Resize.of(recipe), batch_size=1, count=1)).to(device)
    with autocast(recipe.bf16, device):
        features = model.features(batch.images, batch.sizes)
    maps = {}
    for name, level in features.items():
        height, width = (
            -(-size * level.shape[2 + d] // batch.images.shape[2 + d]) for d, size in enumerate(batch.sizes[0].tolist())
        )
        mean = level[0, :, :height, :width].float().abs().mean(dim=0)
        maps[name] = (mean / mean.max().clamp(min=1e-12) * 255).byte().cpu().numpy()
    return maps


def _save_thumbnails(folder: Path, dataset: DetectionDataset, truth: dict[str, Any]) -> None:
    """Small copies of the first images, and of all that is true of them; left alone if they are there."""
    if (folder / TRUTH).exists():
        return
    images = truth["images"][:SHOWN]
    for position, image in enumerate(images):
        sample = dataset[position]
        assert sample.image_id == image["id"]
        picture = Image.fromarray(sample.image)
        picture.thumbnail((SIDE, SIDE))
        write_atomically(folder / f"{image['id']}.jpg", partial(picture.save, quality=82))
    shown = {image["id"]: {"width": image["width"], "height": image["height"], "objects": []} for image in images}
    names = {category["id"]: category["name"] for category in dataset.categories}
    for annotation in truth["annotations"]:
        if annotation["image_id"] in shown:
            entry = {"bbox": annotation["bbox"], "category": names[annotation["category_id"]]}
            shown[annotation["image_id"]]["objects"].append(entry | ({"crowd": True} if annotation.get("iscrowd") else {}))
    content = {"categories": [category["name"] for category in dataset.categories], "images": shown}
    save_text(folder / TRUTH, json.dumps(content))

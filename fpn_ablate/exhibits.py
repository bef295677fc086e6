"""What a report shows of a finished run beyond its figures, from its saved detections and its weights.

`python -m fpn_ablate.exhibits results/runs` makes all of it again, on any machine, but for what the levels hold, which takes
the device that the run was made on. Below the run:
`resampled.npz` (its metrics on images drawn anew, for intervals) and `exhibits.npz` (each image's own figure, and what the
levels of the pyramid hold); in its record `by_size`, `pictures` and `draws`; and once for all runs on the same images,
`<out>/runs/.pictures/<pictures>/`: small copies of the images with their ground truth in `truth.json`.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from fpn_ablate import record
from fpn_ablate.data.loader import evaluation_batches
from fpn_ablate.data.sample import DetectionDataset
from fpn_ablate.errors import UserError
from fpn_ablate.evaluate import declared_truth
from fpn_ablate.files import DETECTIONS, EXHIBITS, PICTURES, TRUTH, UNREADABLE, save_text, write_atomically
from fpn_ablate.metrics import Detections
from fpn_ablate.model.detector import Detector
from fpn_ablate.recall import hits
from fpn_ablate.replicates import FILE as RESAMPLED
from fpn_ablate.replicates import save
from fpn_ablate.resample import FEW, draws, each_image, resample
from fpn_ablate.schema import Config
from fpn_ablate.train import autocast

if TYPE_CHECKING:
    from fpn_ablate.remeasure import Splits

SHOWN = 200  # images of which a small copy is kept
SIDE = 320  # pixels at most


def make(
    folder: Path, dataset: DetectionDataset, found: Detections, cfg: Config, levels: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Write the files of a run, and return what goes into its record.

    Args:
        folder: of the run, three levels below <out>/runs.
        dataset: the split that it was evaluated on; `found`: what it found there.
        levels: as `energy` gives them; empty where the network is out of reach.

    Raises:
        UserError: the disk does not take them.
    """
    truth = declared_truth(dataset, cfg)
    generator = np.random.default_rng(int(dataset.digest[:16], 16))  # the same images for every row
    drawn = draws(len(truth["images"]), generator)
    resampled = resample(truth, found, dataset.categories, dataset.area_bounds, drawn)
    write_atomically(folder / RESAMPLED, partial(save, resampled=resampled))
    ids, values = each_image(truth, found, dataset.categories)
    shown = {f"level_{name}": level for name, level in levels.items()}
    write_atomically(folder / EXHIBITS, lambda path: np.savez_compressed(path, image_ids=ids, values=values, **shown))
    name = f"{dataset.digest[:16]}-{len(ids)}"
    _pictures(folder.resolve().parents[3] / PICTURES / name, dataset, truth)
    drawn_of = hashlib.sha256(np.append(ids, drawn[:FEW]).astype("<i8").tobytes()).hexdigest()[:16]
    return {"by_size": by_size(truth, found, dataset.area_bounds), "pictures": name, "draws": drawn_of}


def by_size(truth: dict[str, Any], found: Detections, area_bounds: tuple[float, float]) -> dict[str, list]:
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
def energy(model: Detector, dataset: DetectionDataset, cfg: Config, device: torch.device) -> dict[str, np.ndarray]:
    """{level: (h, w) uint8}: the mean absolute activation over the channels of each of the neck's levels, for the first image,
    from nothing to the level's own greatest."""
    recipe = cfg.recipe
    sides = {"short_side": recipe.short_side, "max_side": recipe.max_side, "antialias": recipe.antialias}
    batch = next(evaluation_batches(dataset, batch_size=1, count=1, **sides)).to(device)
    with autocast(cfg, device):
        features = model.features(batch.images, batch.sizes)
    maps = {}
    for name, level in features.items():
        height, width = (
            -(-size * level.shape[2 + d] // batch.images.shape[2 + d]) for d, size in enumerate(batch.sizes[0].tolist())
        )
        mean = level[0, :, :height, :width].float().abs().mean(dim=0)
        maps[name] = (mean / mean.max().clamp(min=1e-12) * 255).byte().cpu().numpy()
    return maps


def _pictures(folder: Path, dataset: DetectionDataset, truth: dict[str, Any]) -> None:
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


def main(argv: Sequence[str] | None = None) -> int:
    """0 when all runs have them, 2 when some are not there to be read."""
    from fpn_ablate.remeasure import finished, over_runs  # which runs, and a run makes its exhibits

    def again(folder: Path, splits: "Splits") -> str:
        cfg, known, (_, dataset) = finished(folder, splits)
        found = Detections.load(folder / DETECTIONS)
        record.write(folder, known | make(folder, dataset, found, cfg, _levels(folder, splits)))
        return f"{folder}: made"

    return over_runs(argv, "fpn_ablate.exhibits", __doc__.splitlines()[0], again)


def _levels(folder: Path, splits: "Splits") -> dict[str, np.ndarray]:
    """Of the run's network, or, where it is out of reach, as they were kept before."""
    from fpn_ablate.remeasure import restore

    try:
        trained, cfg, device = restore(folder, splits)
        return energy(trained.model, trained.validation, cfg, device)
    except UserError as error:
        print(f"levels left as they were: {error}", file=sys.stderr)
    try:
        with np.load(folder / EXHIBITS, allow_pickle=False) as kept:
            return {name.removeprefix("level_"): kept[name] for name in kept.files if name.startswith("level_")}
    except UNREADABLE:
        return {}


if __name__ == "__main__":
    sys.exit(main())

"""Look into the pyramid of a trained detector: activations, what the top-down path adds, where each object is found.

Shape letters: M mapped images, d channels, H x W cells, of which h x w are no padding, G objects, R boxes of a level.
"""

import numpy as np
import torch
from torch import Tensor

from fpn_ablate.config.schema import Recipe
from fpn_ablate.data.loader import evaluation_batches
from fpn_ablate.data.transforms import Resize
from fpn_ablate.engine.train import autocast
from fpn_ablate.evaluation.diagnosis import FOREGROUND
from fpn_ablate.model import boxes as box_ops
from fpn_ablate.model.detectors.dense import DenseDetector
from fpn_ablate.model.detectors.two_stage import Detector
from fpn_ablate.model.necks.fpn import FPN
from fpn_ablate.structures.batch import Batch, DetectionDataset
from fpn_ablate.structures.levels import Features

# The first images of the split: those with activation maps, and those whose objects are looked for on each level.
MAPPED_IMAGES, SEARCHED_IMAGES = 3, 16


@torch.no_grad()
def inspect_pyramid(
    model: Detector, dataset: DetectionDataset, recipe: Recipe, device: torch.device, count: int | None
) -> dict[str, np.ndarray]:
    """Compute the levels' activations on the first images, and on which level each object there is found.

    Args:
        count: of the images that are evaluated; None: all.

    Returns:
        mapped_ids: (M,) ids of the images with maps.
        level_<name>, level_<name>.1, ...: (h, w) uint8 of these images: the mean absolute activation over channels; 255 is the
            level's maximum. The neck's first level is the finest.
        added_<name>, ...: of an FPN with a top-down path, the change of the same level when the path is cut, on the same scale.
        found_ids, found_boxes, found_levels: (G,), (G, 4), (G,) of the objects: image, box in the input's shares of width and
            height, and the position of the level whose best box at IoU .5 has the highest score, -1 without one. Absent if the
            detector has no boxes on levels.
        found_names: the levels.
    """
    found: list[tuple[int, list[float], int]] = []
    arrays: dict[str, np.ndarray] = {}
    mapped: list[int] = []
    count = min(SEARCHED_IMAGES, SEARCHED_IMAGES if count is None else count)
    for batch in evaluation_batches(dataset, resize=Resize.of(recipe), batch_size=1, count=count):
        batch = batch.to(device)
        with autocast(recipe.bf16, device):
            features = model.features(batch.images, batch.sizes)
            levels = _boxes_on_levels(model, features)
            if len(mapped) < MAPPED_IMAGES:
                end = f".{len(mapped)}" * bool(mapped)
                arrays |= {f"{name}{end}": values for name, values in _maps(model, batch, features).items()}
                mapped.append(batch.image_ids[0])
        if levels:
            found += _found_on(levels, batch)
    arrays["mapped_ids"] = np.array(mapped, np.int64)
    if found:
        ids, boxes, places = zip(*found, strict=True)
        arrays |= {"found_ids": np.array(ids), "found_boxes": np.array(boxes, np.float32), "found_levels": np.array(places)}
        arrays["found_names"] = np.array(list(features))
    return arrays


def _maps(model: Detector, batch: Batch, features: Features) -> dict[str, np.ndarray]:
    """Return the maps of one image, level_<name> and added_<name>."""
    maps, cut = {}, _without_top_down(model, batch)
    for name, level in features.items():
        level = _valid_cells(level, batch)
        activation = level.abs().mean(dim=0)
        shown = {"level": activation}
        if name in cut:
            shown["added"] = (level - _valid_cells(cut[name], batch)).abs().mean(dim=0)
        highest = activation.max().clamp(min=1e-12)
        shown = {kind: (values / highest * 255).clamp(max=255).byte().cpu().numpy() for kind, values in shown.items()}
        maps |= {f"{kind}_{name}": values for kind, values in shown.items()}
    return maps


def _valid_cells(level: Tensor, batch: Batch) -> Tensor:
    """Return the cells of a level (1, d, H, W) that are not padding, as fp32 (d, h, w)."""
    sides = [-(-size * level.shape[2 + d] // batch.images.shape[2 + d]) for d, size in enumerate(batch.sizes[0].tolist())]
    return level[0, :, : sides[0], : sides[1]].float()


def _without_top_down(model: Detector, batch: Batch) -> Features:
    """Return the levels of an FPN when its top-down path is cut; {} of other necks, and where a level is nothing else."""
    neck = model.neck
    if not (isinstance(neck, FPN) and neck.has_top_down and set(neck.outputs) <= set(neck.lateral)):
        return {}
    neck.has_top_down = False
    try:
        return model.features(batch.images, batch.sizes)
    finally:
        neck.has_top_down = True


def _boxes_on_levels(model: Detector, features: Features) -> list[tuple[Tensor, Tensor]]:
    """Return scores (R,) and boxes (R, 4) of one image, level by level: the RPN's, or those of a dense head's best classes."""
    if model.rpn is not None:
        return [(score[0], box_ops.decode(delta[0], anchor)) for score, delta, anchor in zip(*model.rpn(features), strict=True)]
    if isinstance(model, DenseDetector):
        return [(score[0].amax(-1), box[0]) for score, box in model.head.predict(features)]
    return []


def _found_on(levels: list[tuple[Tensor, Tensor]], batch: Batch) -> list[tuple[int, list[float], int]]:
    """Return (image, box, level) of each object of a batch of one image."""
    objects = batch.boxes[0][batch.valid[0]]
    height, width = batch.sizes[0].tolist()
    best = torch.full((len(objects), len(levels)), -torch.inf)
    for n, (score, box) in enumerate(levels):
        if len(objects) and len(box):
            close = box_ops.iou(objects, box.to(objects.dtype)) >= FOREGROUND  # (G, R)
            best[:, n] = torch.where(close, score.float(), -torch.inf).amax(1).cpu()
    places = torch.where(best.amax(1) > -torch.inf, best.argmax(1), -1).tolist() if len(objects) else []
    shares = (objects / objects.new_tensor([width, height, width, height])).tolist()
    return [(batch.image_ids[0], box, place) for box, place in zip(shares, places, strict=True)]

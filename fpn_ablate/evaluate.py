"""Proposals of a trained row on the validation split, in native pixels."""

from collections.abc import Callable

import numpy as np
import torch

from fpn_ablate.data.loader import evaluation_batches
from fpn_ablate.data.sample import DetectionDataset
from fpn_ablate.data.transforms import to_native
from fpn_ablate.metrics import Detections
from fpn_ablate.model.detector import Detector
from fpn_ablate.schema import Config
from fpn_ablate.train import autocast


@torch.no_grad()
def propose(
    model: Detector,
    dataset: DetectionDataset,
    cfg: Config,
    device: torch.device,
    report: Callable[[int, int], None] = lambda done, images: None,
) -> Detections:
    """Proposals for every image of `dataset`, or for the first `recipe.eval_images`; best first within an image."""
    model.eval()
    recipe = cfg.recipe
    native = {image["id"]: (image["height"], image["width"]) for image in dataset.coco()["images"]}
    batches = evaluation_batches(
        dataset,
        batch_size=recipe.eval_batch_size,
        short_side=recipe.short_side,
        max_side=recipe.max_side,
        workers=cfg.workers,
        count=recipe.eval_images,
    )
    ids, boxes, scores, total = [], [], [], recipe.eval_images or len(dataset)
    for batch in batches:
        batch = batch.to(device)
        with autocast(cfg, device):
            proposals = model.propose(batch.images, batch.sizes)
        for n, image_id in enumerate(batch.image_ids):
            keep = proposals.valid[n]
            own = to_native(proposals.boxes[n][keep].cpu(), batch.sizes[n].tolist(), native[image_id])
            ids.append(np.full(len(own), image_id, np.int64))
            boxes.append(own.numpy().astype(np.float32))
            scores.append(proposals.scores[n][keep].cpu().numpy().astype(np.float32))
        report(len(ids), total)
    return Detections(np.concatenate(ids), np.concatenate(boxes), np.concatenate(scores))


def declared_truth(dataset: DetectionDataset, cfg: Config) -> dict:
    """The ground truth that the proposals are held against: all declared images, whether anything was proposed or not."""
    truth, count = dataset.coco(), cfg.recipe.eval_images
    if count is None or count >= len(truth["images"]):
        return truth
    kept = {image["id"] for image in truth["images"][:count]}
    annotations = [a for a in truth["annotations"] if a["image_id"] in kept]
    return {**truth, "images": truth["images"][:count], "annotations": annotations}

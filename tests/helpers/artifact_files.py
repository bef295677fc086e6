"""What a run leaves for the page beside its record: artifacts, detections, metrics and pictures."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from fpn_ablate.utils import rle

NAME = "0123456789abcdef"
EDGES = [round(4.0 * 2 ** (k / 2), 2) for k in range(10)]


def by_size(first: float = 0.1) -> dict:
    """Recall that rises with the size; none of the smallest."""
    return {"edges": EDGES, "objects": [0, *range(1, 11)], "AR100": [None, *(first + 0.05 * k for k in range(10))]}


def rectangle(x0: int, y0: int, x1: int, y1: int, side: int) -> bytes:
    """A mask that fills a box in an image of side x side pixels."""
    mask = np.zeros((1, side, side), bool)
    mask[:, y0:y1, x0:x1] = True
    return rle.encode(mask)[0]


def leave(
    folder: Path, strength: float, images: int = 12, side: int = 64, detections: bool = False, masks: bool = False
) -> None:
    """Files of one run; `strength` is what it finds of the even images, the odd ones are the other way round."""
    ids = np.arange(1, images + 1)
    values = np.where(ids % 2, 1 - strength, strength)
    levels = {f"level_p{k}": np.full((2 ** (6 - k), 2 ** (6 - k)), 40 * k, dtype=np.uint8) for k in range(2, 6)}
    levels |= {f"level_p{k}.1": levels[f"level_p{k}"][::-1] for k in range(2, 6)}
    added = {"added_p2": levels["level_p2"] // 2, "added_p2.1": levels["level_p2"] // 2}
    np.savez_compressed(folder / "artifacts.npz", image_ids=ids, values=values, **levels, **added, **diagnosed(strength))
    boxes = np.tile(np.array([4.0, 6.0, 20.0, 30.0]), (3 * images, 1))
    more = {"labels": np.ones(3 * images, dtype=int)} if detections else {}
    scores = np.tile([0.9, 0.6, 0.2], images)
    if masks:  # the second matches the object
        three = [rectangle(40, 40, 50, 50, side), rectangle(4, 6, 20, 28, side), rectangle(4, 6, 12, 30, side)]
        more["masks"], more["mask_lengths"] = rle.join(three * images)
        place = folder.parents[3] / ".pictures" / NAME
        place.mkdir(parents=True, exist_ok=True)
        truth = {str(image): [rectangle(4, 6, 20, 30, side).decode()] for image in range(1, images + 1)}
        (place / "masks.json").write_text(json.dumps(truth))
    np.savez_compressed(folder / "detections.npz", image_ids=np.repeat(ids, 3), boxes=boxes, scores=scores, **more)
    lines = [{"step": step, "rpn_class": 1.0 / step + strength, "lr": 0.1} for step in range(20, 501, 20)]
    lines.append({"step": 500, "AR100": 0.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pictures(folder.parents[3] / ".pictures" / NAME, images, side)


def diagnosed(strength: float) -> dict[str, np.ndarray]:
    """What `evaluation.diagnosis` and `runs.pyramid` leave in artifacts.npz: two images with maps, three objects."""
    falling = np.linspace(1, 0, 101)
    return {
        "errors": np.linspace(0, strength, 6),
        "error_counts": np.arange(6),
        "precision": np.stack([strength * falling, strength * falling**2, strength * falling**3]),
        "recall_by_iou": np.outer([1, 0.5, 0.7, np.nan], strength * np.linspace(1, 0.1, 10)),
        "calibration": np.stack([np.arange(10), np.arange(10) * strength, np.arange(10) * np.linspace(0.05, 0.95, 10)], 1),
        "mapped_ids": np.array([1, 2]),
        "found_ids": np.array([1, 1, 2]),
        "found_boxes": np.array([[0.1, 0.1, 0.15, 0.15], [0.2, 0.2, 0.8, 0.8], [0, 0, 1, 1]], np.float32),
        "found_levels": np.array([0, 3, -1]),
        "found_names": np.array(["p2", "p3", "p4", "p5"]),
    }


def pictures(folder: Path, images: int, side: int) -> None:
    if (folder / "truth.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    shown = {}
    for image in range(1, images + 1):
        Image.fromarray(draw.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(folder / f"{image}.jpg", quality=82)
        objects = [{"bbox": [4.0, 6.0, 16.0, 24.0], "category": "red <dot>"}]
        shown[str(image)] = {"width": side, "height": side, "objects": objects}
    (folder / "truth.json").write_text(json.dumps({"categories": ["red <dot>"], "images": shown}))

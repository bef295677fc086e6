"""A valid data set, from which the bad inputs are made."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fpn_ablate.utils import rle

CATEGORIES = [{"id": 3, "name": "bee"}, {"id": 1, "name": "ant"}]
PICTURES = {"a.jpg": (40, 60), "sub/b.png": (50, 50), "c.png": (30, 20)}  # height, width


def valid_annotations() -> dict[str, Any]:
    """Return valid annotations of three pictures."""
    images = [{"id": n, "file_name": name, "height": h, "width": w} for n, (name, (h, w)) in enumerate(PICTURES.items(), 1)]
    boxes = [
        (1, 3, [5, 6, 10, 12.5]),
        (1, 1, [0, 0, 60, 40]),
        (2, 3, [1, 2, 3, 4]),
        (2, 1, [20, 10, 30, 20]),
        (3, 1, [1, 1, 9, 9]),
    ]
    rows = [
        {"id": 10 + n, "image_id": image, "category_id": kind, "bbox": box, "area": box[2] * box[3], "iscrowd": int(n == 3),
         "segmentation": _mask(n, box, list(PICTURES.values())[image - 1])}
        for n, (image, kind, box) in enumerate(boxes)
    ]  # fmt: skip
    return {"info": {"year": 2026}, "images": images, "annotations": rows, "categories": CATEGORIES}


def _mask(n: int, box: list[float], size: tuple[int, int]) -> Any:
    """Return the mask of a box in one of COCO's ways to write it: polygons, run lengths as numbers or as text."""
    x, y, w, h = box
    bitmap = np.zeros((1, *size), bool)
    bitmap[:, int(y) : int(y + h), int(x) : int(x + w)] = True
    (counts,) = rle.encode(bitmap)
    if n % 3 == 0:
        return [[x, y, x + w, y, x, y + h], [x + w, y, x + w, y + h, x, y + h]]
    return {"size": list(size), "counts": counts.decode() if n % 3 == 1 else rle.runs(counts.decode())}


def write_pictures(folder: Path) -> Path:
    """Write the pictures of `valid_annotations`, one more outside their folder, and links to the outside; return the folder."""
    images = folder / "images"
    (images / "sub").mkdir(parents=True)
    for n, (name, (height, width)) in enumerate(PICTURES.items()):
        pixels = np.random.default_rng(n).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / name)
    shutil.copy(images / "c.png", folder / "outside.png")
    (images / "link.png").symlink_to("../outside.png")
    (images / "away").symlink_to("..")
    os.mkfifo(images / "pipe.png")
    return images

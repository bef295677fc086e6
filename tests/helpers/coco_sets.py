"""Small COCO-format sets on disk."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

# The project's folder may stand beside a folder with real sets.
REAL = Path(__file__).parents[2].parent / "shared" / "data"
CATEGORIES = [{"id": 1, "name": "ant"}, {"id": 3, "name": "bee"}, {"id": 90, "name": "cow"}]


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def base() -> dict:
    """Three images (a JPEG, a PNG, one without objects) and four objects, one of them a crowd region."""
    return {
        "categories": [dict(c) for c in reversed(CATEGORIES)],
        "images": [
            {"id": 42, "file_name": "a.jpg", "height": 40, "width": 60},
            {"id": 7, "file_name": "sub/b.png", "height": 50, "width": 50},
            {"id": 9, "file_name": "c.png", "height": 30, "width": 20},
        ],
        "annotations": [
            {"id": 11, "image_id": 7, "category_id": 90, "bbox": [5, 6, 10, 12.5], "area": 100.5, "iscrowd": 0},
            {"id": 12, "image_id": 42, "category_id": 3, "bbox": [0, 0, 60, 40], "area": 2400, "iscrowd": 0},
            {"id": 13, "image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0},
            {"id": 14, "image_id": 42, "category_id": 1, "bbox": [20, 10, 30, 20], "area": 500, "iscrowd": 1},
        ],
    }


def annotation(number: int, image: int, box: list[float], area: float, crowd: bool = False, category: int = 1) -> dict:
    keys = {"id": number, "image_id": image, "category_id": category, "bbox": box}
    return keys | {"area": area, "iscrowd": int(crowd)}


def write(root: Path, data: object) -> tuple[Path, Path]:
    """Write `data` as the annotation file beside the pictures of `base`; returns (annotation file, image folder)."""
    images = root / "images"
    (images / "sub").mkdir(parents=True, exist_ok=True)
    for n, entry in enumerate(base()["images"]):
        Image.fromarray(picture(entry["height"], entry["width"], n)).save(images / entry["file_name"])
    return rewrite(root, data), images


def rewrite(root: Path, data: object) -> Path:
    file = root / "instances.json"
    file.write_text(data if isinstance(data, str) else json.dumps(data))
    return file


# Pictures of a set with two splits, by the last letters of their names: height, width.
SIZES = {"a.png": (40, 60), "b.png": (50, 50), "c.png": (120, 90)}


def split(objects: Iterable[tuple], images: Sequence[str] = tuple(SIZES), first: int = 1) -> dict:
    """An annotation file's content; `objects`: (image id, category id, box, crowd), `first`: the first image's id."""
    return {
        "categories": [dict(c) for c in CATEGORIES],
        "images": [
            {"id": first + n, "file_name": name, "height": SIZES[f"{name[-5]}.png"][0], "width": SIZES[f"{name[-5]}.png"][1]}
            for n, name in enumerate(images)
        ],
        "annotations": [
            {"id": n, "image_id": image, "category_id": c, "bbox": box, "area": box[2] * box[3], "iscrowd": crowd}
            for n, (image, c, box, crowd) in enumerate(objects, start=1)
        ],
    }


def write_splits(root: Path, train: dict, val: dict, folders: Sequence[str] = ("images", "images")) -> str:
    """Write a set of two splits whose pictures all differ; returns the override data.root=..."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    seed = 0
    for name, data, folder in zip(("train", "val"), (train, val), folders, strict=True):
        (root / "annotations" / f"instances_{name}.json").write_text(json.dumps(data))
        for entry in data["images"]:
            path, seed = root / folder / entry["file_name"], seed + 1
            path.parent.mkdir(exist_ok=True)
            if not path.exists():
                Image.fromarray(picture(entry["height"], entry["width"], seed)).save(path)
    return f"data.root={root}"

"""Statistics of one split, and images that two splits share. N images, M annotations, K categories."""

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from fpn_ablate.data.checks.annotations import Annotations
from fpn_ablate.data.checks.examine import clipped
from fpn_ablate.data.checks.images import locate
from fpn_ablate.data.coco import CocoDataset
from fpn_ablate.doctor.splits import Split
from fpn_ablate.evaluation.coco import AREAS

QUANTILES = {"min": 0.0, "q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95, "max": 1.0}


def size_classes(areas: np.ndarray, bounds: tuple[float, float]) -> np.ndarray:
    """Return (M,) 0 small, 1 medium, 2 large, by square pixels: small < bounds[0] <= medium <= bounds[1] < large."""
    return (areas >= bounds[0]).astype(np.int64) + (areas > bounds[1])


def input_boxes(table: Annotations, sizes: np.ndarray) -> np.ndarray:
    """Scale boxes to network inputs of `sizes` (N, 2): (M, 4) XYXY float32, clipped to their images, as training has them."""
    ratio = (sizes / table.sizes)[table.image_index][:, [1, 0, 1, 0]]
    boxes = clipped(table)
    boxes[:, 2:] += boxes[:, :2]
    return (boxes * ratio).astype(np.float32)


def size_facts(objects: Annotations, sizes: np.ndarray, bounds: tuple[float, float], finest_stride: int) -> dict[str, Any]:
    """Count objects by size in native and in input pixels. The size is that of `area`, as in COCO's evaluator."""
    scale = (sizes / objects.sizes).prod(1)[objects.image_index]
    boxes = input_boxes(objects, sizes)
    sides = boxes[:, 2:] - boxes[:, :2]
    with np.errstate(divide="ignore", invalid="ignore"):
        aspect = objects.boxes[:, 3] / objects.boxes[:, 2]
    return {
        "native": _area_facts(objects.areas, bounds),
        "input": _area_facts(objects.areas * scale, CocoDataset.area_bounds),
        "aspect_ratio": quantiles(aspect),
        "below_one_pixel": int((sides < 1).any(1).sum()),
        "below_finest_stride": int((np.sqrt(sides.prod(1)) < finest_stride).sum()),
        "finest_stride": finest_stride,
    }


def _area_facts(areas: np.ndarray, bounds: tuple[float, float]) -> dict[str, Any]:
    counts = np.bincount(size_classes(areas, bounds), minlength=3).tolist()
    return {"bounds": list(bounds), **dict(zip(AREAS[1:], counts, strict=True)), "sqrt_area": quantiles(np.sqrt(areas))}


def quantiles(values: np.ndarray) -> dict[str, float] | None:
    """Return the QUANTILES of values by name; None without values."""
    if not len(values):
        return None
    points = np.quantile(values.astype(np.float64), list(QUANTILES.values()))
    return dict(zip(QUANTILES, points.round(4).tolist(), strict=True))


def image_facts(table: Annotations, keep_empty: bool) -> dict[str, Any]:
    """Count images, objects and objects per image."""
    counts = np.bincount(table.image_index[~table.crowd], minlength=len(table.image_ids))
    return {
        "images": len(counts),
        "images_used": int(table.used_images(keep_empty).sum()),
        "images_without_objects": int((counts == 0).sum()),
        "objects": int(counts.sum()),
        "crowd": int(table.crowd.sum()),
        "crowd_share": round(float(table.crowd.mean()), 6) if len(table.crowd) else 0.0,
        "objects_an_image": {
            "mean": round(float(counts.mean()), 4),
            "median": float(np.median(counts)),
            "max": int(counts.max()),
            "above_100": int((counts > 100).sum()),  # more detections of an image count neither in AR100 nor in AP
        },
    }


def category_facts(objects: Annotations) -> list[dict[str, Any]]:
    """Count objects and images of each category, in the order of labels."""
    pairs = np.unique(np.stack([objects.labels, objects.image_index], 1), axis=0)
    counts, images = (np.bincount(labels, minlength=len(objects.categories) + 1) for labels in (objects.labels, pairs[:, 0]))
    return [
        {"id": category["id"], "name": category["name"], "objects": int(counts[label]), "images": int(images[label])}
        for label, category in enumerate(objects.categories, start=1)
    ]


def imbalance(categories: Sequence[dict[str, Any]]) -> float | None:
    """Return the ratio of objects of the most frequent category to the rarest that has objects; None without objects."""
    counts = [category["objects"] for category in categories if category["objects"]]
    return round(max(counts) / min(counts), 4) if counts else None


def duplicate_facts(table: Annotations) -> dict[str, Any]:
    """Find annotations that repeat image, category and box of an earlier one, and file names that images share."""
    # Labels and crowd flags as columns of one array with the boxes: int64 below 2^53 is exact in float64.
    rows = np.column_stack([table.image_index, table.labels, table.crowd, table.boxes])
    _, first = np.unique(rows, axis=0, return_index=True)
    repeated = np.setdiff1d(np.arange(len(rows)), first)
    names, counts = np.unique(np.array(table.file_names, dtype=object), return_counts=True)
    return {
        "annotations": len(repeated),
        "annotation_ids": table.ids[repeated].tolist(),
        "file_names": int((counts - 1).sum()),
        "shared_file_names": names[counts > 1].tolist(),
    }


def shared_images(train: Split, val: Split) -> dict[str, Any]:
    """Find images that both splits contain: with the same file name and size, or the same content (sha256).

    Only files whose number of bytes occurs in both splits are read, once each. A picture that was saved again or scaled is
    not recognised.
    """
    first, second = _by_name(train), _by_name(val)
    by_name = [{"file_name": key[0], "train": first[key], "val": second[key]} for key in sorted(first.keys() & second.keys())]
    first, second = _by_content(train, val), _by_content(val, train)
    by_content = [{"train": first[key], "val": second[key]} for key in sorted(first.keys() & second.keys())]
    return {"by_name_and_size": by_name, "by_content": by_content}


def _by_name(split: Split) -> dict[tuple[str, int, int], int]:
    """Map (file name, height, width) to image id."""
    keys = zip(split.table.file_names, split.table.sizes.tolist(), split.table.image_ids.tolist(), strict=True)
    return {(name, *size): key for name, size, key in keys}


def _by_content(split: Split, other: Split) -> dict[str, int]:
    """Map sha256 to image id, for files with as many bytes as a file of the other split."""
    if split.report.file_bytes is None or other.report.file_bytes is None:
        return {}
    root, ids = os.path.realpath(split.report.image_folder), {}
    for n in np.flatnonzero(np.isin(split.report.file_bytes, other.report.file_bytes)).tolist():
        path = locate(root, split.table.file_names[n], split.report.links)
        if path and os.path.isfile(path):  # reading a pipe would block
            with suppress(OSError), open(path, "rb") as file:  # `examine` reports what cannot be read
                ids.setdefault(hashlib.file_digest(file, "sha256").hexdigest(), int(split.table.image_ids[n]))
    return ids

"""Statistics of one split, and images that two splits share. N images, M annotations, K categories."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fpn_ablate.data.checks.annotations import Annotations
from fpn_ablate.data.checks.examine import clipped
from fpn_ablate.data.checks.images import locate
from fpn_ablate.data.coco import CocoDataset
from fpn_ablate.doctor.splits import Split
from fpn_ablate.evaluation.coco import AREAS

QUANTILES = {"min": 0.0, "q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95, "max": 1.0}
MAX_DETECTIONS = 100  # per image, that AR100 and AP count


def size_classes(areas: np.ndarray, bounds: tuple[float, float]) -> np.ndarray:
    """Return (M,) 0 small, 1 medium, 2 large, by square pixels: small < bounds[0] <= medium <= bounds[1] < large."""
    return (areas >= bounds[0]).astype(np.int64) + (areas > bounds[1])


def object_mask(table: Annotations) -> np.ndarray:
    """Return (M,) bool: the annotations that are objects, not crowd regions."""
    return ~table.crowd


def input_boxes(table: Annotations, sizes: np.ndarray) -> np.ndarray:
    """Scale boxes to network inputs of `sizes` (N, 2): (M, 4) XYXY float32, clipped to their images, as training has them."""
    ratio = (sizes / table.sizes)[table.image_index][:, [1, 0, 1, 0]]
    boxes = clipped(table)
    boxes[:, 2:] += boxes[:, :2]
    return (boxes * ratio).astype(np.float32)


def size_facts(table: Annotations, sizes: np.ndarray, bounds: tuple[float, float], finest_stride: int) -> dict[str, Any]:
    """Count objects by size in native and in input pixels. The size is that of `area`, as in COCO's evaluator."""
    objects = object_mask(table)
    scale = (sizes / table.sizes).prod(1)[table.image_index]
    sides = input_boxes(table, sizes)[objects]
    sides = sides[:, 2:] - sides[:, :2]
    with np.errstate(divide="ignore", invalid="ignore"):
        aspect = table.boxes[objects, 3] / table.boxes[objects, 2]
    by_size = {
        scope: {"bounds": list(limits), **_counts(areas[objects], limits), "sqrt_area": quantiles(np.sqrt(areas[objects]))}
        for scope, areas, limits in (
            ("native", table.areas, bounds),
            ("input", table.areas * scale, CocoDataset.area_bounds),
        )
    }
    return by_size | {
        "aspect_ratio": quantiles(aspect),
        "below_one_pixel": int((sides.min(1) < 1).sum()) if len(sides) else 0,
        "below_finest_stride": int((np.sqrt(sides.prod(1)) < finest_stride).sum()),
        "finest_stride": finest_stride,
    }


def _counts(areas: np.ndarray, bounds: tuple[float, float]) -> dict[str, int]:
    """Count small, medium and large areas."""
    counts = np.bincount(size_classes(areas, bounds), minlength=3)
    return dict(zip(AREAS[1:], counts.tolist(), strict=True))


def quantiles(values: np.ndarray) -> dict[str, float] | None:
    """Return the QUANTILES of values by name; None without values."""
    if not len(values):
        return None
    points = np.quantile(values.astype(np.float64), list(QUANTILES.values()))
    return dict(zip(QUANTILES, points.round(4).tolist(), strict=True))


def image_facts(split: Split) -> dict[str, Any]:
    """Count images, objects and objects per image."""
    table = split.table
    assert table is not None
    counts = np.bincount(table.image_index[object_mask(table)], minlength=len(table.image_ids))
    return {
        "images": len(counts),
        "images_used": int(split.used.sum()),
        "images_without_objects": int((counts == 0).sum()),
        "objects": int(counts.sum()),
        "crowd": int(table.crowd.sum()),
        "crowd_share": round(float(table.crowd.mean()), 6) if len(table.crowd) else 0.0,
        "objects_an_image": {
            "mean": round(float(counts.mean()), 4),
            "median": float(np.median(counts)),
            "max": int(counts.max()),
            f"above_{MAX_DETECTIONS}": int((counts > MAX_DETECTIONS).sum()),
        },
    }


def category_facts(table: Annotations) -> list[dict[str, Any]]:
    """Count objects and images of each category, in the order of labels."""
    objects = object_mask(table)
    labels, images = table.labels[objects], table.image_index[objects]
    counts = np.bincount(labels - 1, minlength=len(table.categories))
    pairs = np.unique(np.stack([labels, images], 1), axis=0)
    image_counts = np.bincount(pairs[:, 0] - 1, minlength=len(table.categories))
    rows = zip(table.categories, counts.tolist(), image_counts.tolist(), strict=True)
    return [{"id": c["id"], "name": c["name"], "objects": objects, "images": images} for c, objects, images in rows]


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
    assert train.table is not None
    assert val.table is not None
    names = [_by_name(split.table) for split in (train, val)]
    by_name = sorted(set(names[0]) & set(names[1]))
    contents = [_by_content(split, other) for split, other in ((train, val), (val, train))]
    by_content = sorted(set(contents[0]) & set(contents[1]))
    return {
        "by_name_and_size": [{"file_name": key[0], "train": names[0][key], "val": names[1][key]} for key in by_name],
        "by_content": [{"train": contents[0][key], "val": contents[1][key]} for key in by_content],
    }


def _by_name(table: Annotations | None) -> dict[tuple[str, int, int], int]:
    """Map (file name, height, width) to image id."""
    assert table is not None
    keys = zip(table.file_names, table.sizes.tolist(), table.image_ids.tolist(), strict=True)
    return {(name, *size): key for name, size, key in keys}


def _by_content(split: Split, other: Split) -> dict[str, int]:
    """Map sha256 to image id, for files with as many bytes as a file of the other split."""
    if split.file_bytes is None or other.file_bytes is None or split.table is None or split.folder is None:
        return {}
    root, ids = os.path.realpath(split.folder), {}
    for n in np.flatnonzero(np.isin(split.file_bytes, other.file_bytes)).tolist():
        path = locate(root, split.table.file_names[n])
        digest = _sha256(path) if path and os.path.isfile(path) else None  # reading a pipe would block
        if digest:
            ids.setdefault(digest, int(split.table.image_ids[n]))
    return ids


def _sha256(path: str) -> str | None:
    """Hash a file; None if it cannot be read, which `examine` reports."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def list_first(items: Iterable[Any], limit: int = 5) -> str:
    """List the first items, and count the others, for a sentence."""
    items = [str(item) for item in items]
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")

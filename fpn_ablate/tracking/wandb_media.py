"""Images with boxes and tables in wandb's format, from the files that a run leaves on the disk (fpn_ablate.runs.artifacts)."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fpn_ablate.evaluation.display import MAX_PROPOSALS, MIN_SCORE
from fpn_ablate.utils.files import UNREADABLE, leads_out, open_arrays, safe_name
from fpn_ablate.utils.paths import DETECTIONS, PICTURES, TRUTH

MAX_IMAGES = 8
Boxes = dict[str, dict[str, Any]]  # layer -> wandb's boxes, as fractions of the image's width and height


def images_with_boxes(folder: Path, record: dict[str, Any]) -> list[tuple[Path, Boxes]]:
    """Return the first images that a run was evaluated on, with its boxes and the ground truth; none if they are not stored.

    Args:
        folder: the run's folder. record: its record.
    """
    pictures = folder.resolve().parents[3] / PICTURES / safe_name(str(record.get("pictures")))
    try:
        content = json.loads((pictures / TRUTH).read_text(encoding="utf-8"))
        with open_arrays(folder / DETECTIONS) as file:
            arrays = {name: file[name] for name in file.files}
        names = dict(enumerate(["object", *content["categories"]]))
        images = []
        for key, image in list(content["images"].items())[:MAX_IMAGES]:
            layers = {"found": _predictions(arrays, int(key), image), "truth": _ground_truth(image, names)}
            boxes = {name: {"box_data": data, "class_labels": names} for name, data in layers.items() if data}
            picture = pictures / f"{int(key)}.jpg"
            if leads_out(pictures, picture):  # wandb would send that file
                return []
            images.append((picture, boxes))
        return images
    except UNREADABLE:
        return []


def result_tables(record: dict[str, Any]) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """Return a record's tables {name: (columns, lines)}: AP by class and recall by object size, if it has them."""
    tables: dict[str, tuple[list[str], list[list[Any]]]] = {}
    for key, name in (("per_class", "AP by class"), ("mask_per_class", "mask AP by class")):
        tables[name] = ["class", "AP"], [list(item) for item in record.get(key, {}).items()]
    sizes = record.get("by_size", {})
    edges = sizes.get("edges", [])
    lines = zip([0.0, *edges], [*edges, None], sizes.get("objects", []), sizes.get("AR100", []), strict=False)
    tables["recall by object size"] = ["from px", "to px", "objects", "AR@100"], [list(line) for line in lines]
    return {name: table for name, table in tables.items() if table[1]}


def _predictions(arrays: dict[str, Any], image_id: int, image: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the boxes of one image, best first: proposals, which have no class, or the detections of at least MIN_SCORE."""
    labels, scores = arrays.get("labels"), arrays["scores"]
    order = [k for k, key in enumerate(arrays["image_ids"].tolist()) if key == image_id]
    order.sort(key=lambda k: -scores[k])
    order = order[:MAX_PROPOSALS] if labels is None else [k for k in order if scores[k] >= MIN_SCORE]
    return [
        _box(arrays["boxes"][k].tolist(), image, 0 if labels is None else int(labels[k]))
        | {"scores": {"score": float(scores[k])}}
        for k in order
    ]


def _ground_truth(image: dict[str, Any], names: dict[int, str]) -> list[dict[str, Any]]:
    number = {name: k for k, name in names.items()}
    corners = [(x, y, x + w, y + h) for x, y, w, h in (item["bbox"] for item in image["objects"])]
    return [_box(box, image, number[item["category"]]) for box, item in zip(corners, image["objects"], strict=True)]


def _box(box: Iterable[float], image: dict[str, Any], label: int) -> dict[str, Any]:
    """Convert an XYXY box in native pixels, clipped to the image, outside of which wandb accepts no boxes."""
    sides = zip(("minX", "minY", "maxX", "maxY"), box, (image["width"], image["height"]) * 2, strict=True)
    return {"position": {name: min(max(value / side, 0.0), 1.0) for name, value, side in sides}, "class_id": label}

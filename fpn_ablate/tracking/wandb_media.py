"""Pictures with boxes as wandb draws them, from what a run has left on the disk (fpn_ablate.runs.artifacts)."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fpn_ablate.utils.files import UNREADABLE, safe_name
from fpn_ablate.utils.paths import DETECTIONS, PICTURES, TRUTH

SHOWN, BEST, SCORE = 8, 20, 0.5  # pictures, and in each: proposals at most, and the least score of a detection
Boxes = dict[str, dict[str, Any]]  # layer -> wandb's boxes, in shares of the picture's sides


def drawn(folder: Path, outcome: dict[str, Any]) -> list[tuple[Path, Boxes]]:
    """The first pictures that a run was evaluated on, with its boxes and the ground truth; none where they are not kept.

    Args:
        folder: of the run. outcome: its record.
    """
    import numpy as np

    place = folder.resolve().parents[3] / PICTURES / safe_name(str(outcome.get("pictures")))
    try:
        content = json.loads((place / TRUTH).read_text(encoding="utf-8"))
        with np.load(folder / DETECTIONS, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        names = dict(enumerate(["object", *content["categories"]]))
        shown = []
        for key, image in list(content["images"].items())[:SHOWN]:
            layers = {"found": _found(arrays, int(key), image), "truth": _true(image, names)}
            boxes = {name: {"box_data": data, "class_labels": names} for name, data in layers.items() if data}
            shown.append((place / f"{key}.jpg", boxes))
        return shown
    except UNREADABLE:
        return []


def _found(arrays: dict[str, Any], image_id: int, image: dict[str, Any]) -> list[dict[str, Any]]:
    """Best first. Of proposals, which have no class, so many; of detections those that are rather right than wrong."""
    labels, scores = arrays.get("labels"), arrays["scores"]
    own = [k for k, key in enumerate(arrays["image_ids"].tolist()) if key == image_id]
    own.sort(key=lambda k: -scores[k])
    own = own[:BEST] if labels is None else [k for k in own if scores[k] >= SCORE]
    return [
        _box(arrays["boxes"][k].tolist(), image, 0 if labels is None else int(labels[k]))
        | {"scores": {"score": float(scores[k])}}
        for k in own
    ]


def _true(image: dict[str, Any], names: dict[int, str]) -> list[dict[str, Any]]:
    number = {name: k for k, name in names.items()}
    corners = [(x, y, x + w, y + h) for x, y, w, h in (item["bbox"] for item in image["objects"])]
    return [_box(box, image, number[item["category"]]) for box, item in zip(corners, image["objects"], strict=True)]


def _box(box: Iterable[float], image: dict[str, Any], label: int) -> dict[str, Any]:
    """Of XYXY in native pixels; cut off at the picture's border, outside of which wandb takes none."""
    sides = zip(("minX", "minY", "maxX", "maxY"), box, (image["width"], image["height"]) * 2, strict=True)
    return {"position": {name: min(max(value / side, 0.0), 1.0) for name, value, side in sides}, "class_id": label}

"""Charts of what detections get right and wrong, from the diagnosis in the runs' artifacts (`evaluation.diagnosis`)."""

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from fpn_ablate.evaluation.coco import AREAS
from fpn_ablate.evaluation.diagnosis import BINS, ERRORS, FOREGROUND, RECALLS
from fpn_ablate.evaluation.recall import THRESHOLDS
from fpn_ablate.report.collate.table import Row, Table, clean
from fpn_ablate.report.html.vega import (
    FAINT,
    MUTED,
    Chart,
    Point,
    mean_band,
    point_of,
    quantity,
    round_to,
    row_colour,
    row_key,
    seed_tips,
    specification,
    tip,
    when_highlighted,
)  # fmt: skip
from fpn_ablate.utils.files import UNREADABLE, open_arrays
from fpn_ablate.utils.numbers import is_finite
from fpn_ablate.utils.paths import ARTIFACTS

SHAPES = {"errors": (6,), "error_counts": (6,), "precision": (3, 101), "recall_by_iou": (4, 10), "calibration": (BINS, 3)}
CURVE_NAMES = ("IoU .50", "IoU .75", "mean of IoU .50:.05:.95")
MAX_CLASSES = 24  # of the chart by class; above that those on which the rows differ most
Runs = list[tuple[Row, list[dict[str, Any]]]]  # rows with the arrays of their seeds


def diagnosis(table: Table, colours: Mapping[str, int], steps: int) -> list[Chart | str]:
    """Build the charts of a table whose runs have a diagnosis, and one of AP by class. `steps`: points of a curve."""
    by_class = [chart] if (chart := classes(table, colours)) else []
    files = {
        row.row: [row.folders[seed] / ARTIFACTS for seed in row.seeds if seed in row.folders] for row in table.finished_rows
    }
    stamped = {row: [(file, stamp) for file in of_row if (stamp := _stamp(file))] for row, of_row in files.items()}
    runs = [(row, [arrays for key in stamped[row.row] if (arrays := _load(*key))]) for row in table.finished_rows]
    runs = [(row, arrays) for row, arrays in runs if arrays]
    if not runs:
        absent = "Errors and curves: python -m fpn_ablate artifacts RUNS adds them."
        return [*by_class, *([absent] if any(stamped.values()) else [])]
    labelled = any(record.get("metrics.AP") is not None for row, _ in runs for record in row.finished)
    drawn = [errors(runs, colours), precision(runs, colours, steps), *by_class, recall_by_iou(runs, colours)]
    drawn += [calibration(runs, colours)] if labelled else []
    return drawn + ([chart] if (chart := levels(runs)) else [])


def errors(runs: Runs, colours: Mapping[str, int]) -> Chart:
    """Plot what fixing each kind of error would add to AP50."""
    points: list[Point] = []
    for row, arrays in runs:
        for n, kind in enumerate(ERRORS):
            values = [100 * float(a["errors"][n]) for a in arrays if np.isfinite(a["errors"][n])]
            if values:
                count = round_to(float(np.mean([a["error_counts"][n] for a in arrays])), 1)
                points.append(point_of(row, colours, values) | {"error": kind, "count": count})
    tips = [tip("label", "row"), tip("error"), tip("mean", "points of AP@0.5", ".1f"), *seed_tips(".1f")]
    tips.insert(3, tip("count", "number", ",.0f"))
    encoding = {
        "y": {"field": "error", "type": "nominal", "sort": None, "title": None, "axis": {"labelLimit": 150, "grid": False}},
        "yOffset": {"field": "row", "type": "nominal", "sort": None, "scale": {"paddingOuter": 0.15}},
        "x": quantity("mean", "points of AP@0.5 gained if fixed", axis={"tickCount": 6}),
        "color": row_colour(colours),
        "opacity": when_highlighted(1, 0.15),
    }
    spec = specification(points, [{"mark": "bar", "encoding": {"tooltip": tips}}], encoding)
    note = (
        "Kinds of TIDE (Bolya et al. 2020) among the best 100 of an image, at IoU .5: fixed one kind at a time, so the bars "
        "of a row do not add up. Missed: objects without any detection that a better box or class would make right."
    )
    return Chart("errors", "Errors by kind", note, spec | {"height": max(180, 6 * (5 * len(runs) + 8))})


def precision(runs: Runs, colours: Mapping[str, int], steps: int) -> Chart:
    """Plot precision against recall, mean over classes."""
    points: list[Point] = []
    stride = max(4, round(100 / max(steps, 10)))
    for row, arrays in runs:
        for n, name in enumerate(CURVE_NAMES):
            for r in range(0, 101, stride):
                values = [100 * float(a["precision"][n, r]) for a in arrays if np.isfinite(a["precision"][n, r])]
                if values:
                    points.append(point_of(row, colours, values, 1) | {"curve": name, "recall": round(100 * RECALLS[r])})
    tips = [tip("label", "row"), tip("recall"), tip("mean", "precision (%)", ".1f"), *seed_tips(".1f")]
    x = quantity("recall", "recall (%)", scale={"domain": [0, 100]}, axis={"grid": False})
    layers = mean_band("precision (%)", tips, dots=3)
    spec = specification(points, layers, {"x": x, "color": row_colour(colours)}, "curve", CURVE_NAMES[0])
    note = "COCO's interpolated precision, mean over classes (proposals: one class). Band: from the lowest seed to the highest."
    return Chart("precision", "Precision and recall", note, spec, CURVE_NAMES, "curve")


def recall_by_iou(runs: Runs, colours: Mapping[str, int]) -> Chart:
    """Plot recall of the best 100 against the IoU that a match needs."""
    points: list[Point] = []
    for row, arrays in runs:
        for area, name in enumerate(AREAS):
            for t, iou in enumerate(THRESHOLDS):
                values = [100 * float(a["recall_by_iou"][area, t]) for a in arrays if np.isfinite(a["recall_by_iou"][area, t])]
                if values:
                    points.append(point_of(row, colours, values, 1) | {"objects": name, "iou": round(float(iou), 2)})
    tips = [tip("label", "row"), tip("iou", "IoU"), tip("mean", "recall (%)", ".1f"), *seed_tips(".1f")]
    x = quantity("iou", "IoU that counts as found", scale={"zero": False}, axis={"grid": False, "format": ".2f"})
    spec = specification(
        points, mean_band("recall (%)", tips, dots=14), {"x": x, "color": row_colour(colours)}, "objects", "all"
    )
    note = "Recall of the best 100 of an image, without classes; its mean over these IoUs is AR@100."
    return Chart("iou", "Recall by IoU", note, spec, AREAS, "objects")


def calibration(runs: Runs, colours: Mapping[str, int]) -> Chart:
    """Plot how many detections of a score are correct."""
    points: list[Point] = []
    for row, arrays in runs:
        for n, (count, correct, scores) in enumerate(np.sum([a["calibration"] for a in arrays], 0)):
            if count:
                values = {"score": round_to(100 * scores / count), "mean": round_to(100 * correct / count), "count": int(count)}
                of_bin = f"{100 * n // BINS}–{100 * (n + 1) // BINS} %"
                points.append({"row": row_key(row, colours), "label": row.name, "scores": of_bin} | values)
    tips = [tip("label", "row"), tip("scores"), tip("count", "detections", ",.0f"), tip("mean", "correct (%)", ".1f")]
    domain = {"domain": [0, 100]}
    opacity = when_highlighted(1, 0.12)
    y = quantity("mean", "correct (%)", scale=domain)
    diagonal = {"x": quantity("score"), "y": quantity("at"), "color": {"value": MUTED}}
    layers = [
        {
            "data": {"values": [{"score": 0, "at": 0}, {"score": 100, "at": 100}]},
            "mark": {"type": "line", "strokeDash": [3, 3], "stroke": FAINT},
            "encoding": diagonal,
        },
        {"mark": {"type": "line", "strokeWidth": 1.6}, "encoding": {"y": y, "opacity": opacity}},
        {"mark": {"type": "point", "filled": True, "size": 40}, "encoding": {"y": y, "opacity": opacity, "tooltip": tips}},
    ]
    x = quantity("score", "score (%), mean of a tenth", scale=domain, axis={"grid": False})
    spec = specification(points, layers, {"x": x, "color": row_colour(colours)})
    note = f"Correct: matches an object of its class at IoU {FOREGROUND:g}. On the dashed line scores are probabilities."
    return Chart("calibration", "Calibration of the scores", note, spec)


def classes(table: Table, colours: Mapping[str, int]) -> Chart | None:
    """Plot AP of each class; None without classes."""
    points: list[Point] = []
    for row in table.finished_rows:
        by_class: dict[str, list[float]] = {}
        for record in row.finished:
            for key, value in record.items():
                if key.startswith("per_class.") and is_finite(value):
                    by_class.setdefault(key.removeprefix("per_class."), []).append(100 * value)
        points += [point_of(row, colours, values) | {"class": clean(name)} for name, values in by_class.items()]
    names = list(dict.fromkeys(point["class"] for point in points))
    if len(names) < 2:
        return None
    means = {name: [point["mean"] for point in points if point["class"] == name] for name in names}
    chosen = sorted(names, key=lambda name: min(means[name]) - max(means[name]))[:MAX_CLASSES]
    order = sorted(chosen, key=lambda name: -float(np.mean(means[name])))
    points = [point for name in order for point in points if point["class"] == name]
    tips = [tip("label", "row"), tip("class"), tip("mean", "AP (%)", ".1f"), *seed_tips(".1f")]
    opacity = when_highlighted(1, 0.15)
    encoding = {
        "y": {"field": "class", "type": "nominal", "sort": None, "title": None, "axis": {"labelLimit": 150, "grid": True}},
        "x": quantity("mean", "AP (%)", scale={"zero": False, "nice": True}, axis={"tickCount": 6, "grid": False}),
        "color": row_colour(colours),
        "opacity": opacity,
    }
    spec = specification(
        points, [{"mark": {"type": "point", "filled": True, "size": 60}, "encoding": {"tooltip": tips}}], encoding
    )
    left = f" Those {MAX_CLASSES} of {len(names)} classes on which the rows differ most." if len(names) > MAX_CLASSES else ""
    return Chart(
        "classes", "AP by class", f"Mean over seeds, over IoU .50:.05:.95.{left}", spec | {"height": max(140, 22 * len(order))}
    )


def levels(runs: Runs) -> Chart | None:
    """Plot on which level the objects of each size are found; None without any."""
    points: list[Point] = []
    for row, arrays in runs:
        counts: Counter[tuple[str, str]] = Counter()
        for a in (a for a in arrays if len(a.get("found_levels", ()))):
            names = [*(name.upper() for name in a["found_names"].tolist()), "not found"]
            for size, level in zip(_sizes(a["found_boxes"]), a["found_levels"].tolist(), strict=True):
                counts[size, clean(names[level])] += 1
        for size in SIZES:
            total = sum(count for (s, _), count in counts.items() if s == size)
            for (_, level), count in sorted(item for item in counts.items() if item[0][0] == size):
                share = round_to(100 * count / total)
                points.append({"label": row.name, "object": size, "level": level, "share": share, "objects": count})
    choices = tuple(dict.fromkeys(point["label"] for point in points))
    if not choices:
        return None
    names = sorted({point["level"] for point in points} - {"not found"})
    colours = {**{name: f"var(--l{n})" for n, name in enumerate(names)}, "not found": "var(--noise)"}
    tips = [tip("object"), tip("level"), tip("objects"), tip("share", "share (%)", ".0f")]
    encoding = {
        "x": quantity("share", "share of the objects (%)", stack="zero", scale={"domain": [0, 100]}),
        "y": {"field": "object", "type": "nominal", "sort": list(SIZES), "title": "side, of the image's"},
        "color": {
            **{"field": "level", "type": "nominal", "title": None},
            "scale": {"domain": list(colours), "range": list(colours.values())},
        },
    }
    spec = specification(points, [{"mark": "bar", "encoding": {"tooltip": tips}}], encoding, "label", choices[0])
    note = (
        "The level whose box (of the RPN or the dense head) has the highest score of all that overlap the object by IoU .5; "
        "on the first 16 images."
    )
    return Chart("found", "Level on which objects are found", note, spec | {"height": 170}, choices, "label")


SIZES = {"under 1/16": 1 / 16, "1/16–1/8": 1 / 8, "1/8–1/4": 1 / 4, "over 1/4": np.inf}


def _sizes(boxes: np.ndarray) -> Iterator[str]:
    """Yield the size class of boxes (G, 4), in shares of the image's sides."""
    for x0, y0, x1, y1 in boxes.tolist():
        side = max((x1 - x0) * (y1 - y0), 0) ** 0.5
        yield next(name for name, bound in SIZES.items() if side <= bound)


def _stamp(file: Path) -> tuple[int, int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


@lru_cache(maxsize=4096)
def _load(file: Path, stamp: tuple[int, int]) -> dict[str, Any] | None:
    """Read the diagnosis of a run, and where its objects are found; None without a diagnosis, or a damaged one."""
    try:
        with open_arrays(file) as content:
            arrays = {name: content[name] for name in content.files if name in SHAPES or name.startswith("found_")}
            shapes = {name: arrays[name].shape for name in SHAPES}
            if shapes != SHAPES or not all(_are_numbers(arrays[name], largest=1e9) for name in SHAPES):
                return None
            if not np.isfinite([*arrays["calibration"].flat, *arrays["error_counts"]]).all():
                return None
            complete = _fits(*(arrays.get(f"found_{key}") for key in ("levels", "boxes", "names")))
            return arrays if complete else {name: arrays[name] for name in SHAPES}
    except UNREADABLE:
        return None


def _are_numbers(array: np.ndarray, largest: float) -> bool:
    """Return whether an array holds numbers up to `largest`, or NaN, where something is not defined."""
    return array.dtype.kind in "fiu" and not (np.abs(array.astype(float)) > largest).any()


def _fits(levels: np.ndarray | None, boxes: np.ndarray | None, names: np.ndarray | None) -> bool:
    """Return whether found objects are complete: a level of `names`, or -1, and a box (G, 4) of each."""
    if levels is None or boxes is None or names is None or levels.ndim != 1 or boxes.shape != (len(levels), 4):
        return False
    kinds = levels.dtype.kind in "iu" and boxes.dtype.kind == "f" and names.dtype.kind == "U"
    return kinds and bool(np.isfinite(boxes).all() and ((levels >= -1) & (levels < len(names))).all())

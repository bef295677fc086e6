"""Learning curves: of finished runs, mean over seeds, and of the runs in progress, each by itself."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fpn_ablate.report.collate.table import Table, clean
from fpn_ablate.report.html.vega import (
    COLOURS,
    Chart,
    Point,
    mean_axis,
    mean_band,
    point_of,
    quantity,
    row_colour,
    seed_tips,
    specification,
    tip,
)
from fpn_ablate.utils.numbers import is_finite
from fpn_ablate.utils.paths import METRICS, THROUGHPUT

MAX_STEPS = 60  # points of a learning curve: more are not visible, and make the page heavy
RATE, PACE_KEY = "lr", "images_per_s"
TITLES = {RATE: "learning rate", PACE_KEY: "images per second"}


def curves(table: Table, colours: Mapping[str, int], steps: int = MAX_STEPS) -> Chart | str:
    """Plot one loss at a time against the step: mean and extremes over the finished seeds whose folder is on this disk."""
    points: list[Point] = []
    for row in table.finished_rows:
        by_loss: dict[str, dict[int, list[float]]] = {}
        metrics = {key.removeprefix("metrics.") for record in row.records for key in record if key.startswith("metrics.")}
        for folder in (row.folders[seed] for seed in row.seeds if seed in row.folders):
            for loss, step, value in _logged(folder / METRICS):
                if loss not in (RATE, *metrics):
                    by_loss.setdefault(loss, {}).setdefault(step, []).append(value)
        for loss, by_step in by_loss.items():
            for step in sorted(by_step)[:: math.ceil(len(by_step) / steps)]:
                points.append(point_of(row, colours, by_step[step], 4) | {"loss": loss, "step": step})
    if not points:
        absent = "the folders of the runs, with their metrics.jsonl, are not on this disk."
        return f"Learning curves: {absent if table.finished_rows else 'no run is finished.'}"
    choices = tuple(dict.fromkeys(point["loss"] for point in points))
    tips = [tip("label", "row"), tip("loss"), tip("step"), tip("mean", "loss", ".4f"), *seed_tips(".4f")]
    x = quantity("step", "step", axis={"grid": False, "tickCount": 6})
    dots = 4 if len({point["step"] for point in points}) > 1 else 26  # a line shows itself, a single step does not
    spec = specification(points, mean_band("loss", tips, dots), {"x": x, "color": row_colour(colours)}, "loss", choices[0])
    note = "Line: mean over seeds; band: from the lowest seed to the highest."
    return Chart("curves", "Learning curves", note, spec, choices, "loss")


def live_curves(running: Sequence[tuple[str, Path]]) -> Chart | None:
    """Plot losses, learning rate and images per second of the runs in progress: (name, folder); None before the first line."""
    points: list[Point] = []
    for number, (name, folder) in enumerate(running):
        by_key: dict[str, dict[int, float]] = {}
        for key, step, value in (*_logged(folder / METRICS), *_logged(folder / THROUGHPUT)):
            by_key.setdefault(key, {})[step] = value  # of a step that was repeated, the last
        for key, values in by_key.items():
            for step in sorted(values)[:: math.ceil(len(values) / (2 * MAX_STEPS))]:
                curve = {"row": f"r{number}", "label": name, "curve": TITLES.get(key, key), "step": step}
                points.append(curve | {"mean": float(f"{values[step]:.4g}")})
    if not points:
        return None
    # As logged: losses, then what an evaluation adds; the first is shown, whatever is added later.
    curves = sorted(dict.fromkeys(point["curve"] for point in points), key=lambda name: name in TITLES.values())
    labels = {f"r{number}": name for number, (name, _) in enumerate(running)}
    colour = row_colour({name: number % COLOURS for number, name in enumerate(labels)})
    columns = 2 if max(map(len, labels.values())) <= 24 else 1  # two long names are wider than a telephone
    legend = {"title": None, "orient": "top", "columns": columns, "labelLimit": 260, "symbolOpacity": 1}
    colour |= {"legend": legend | {"values": list(labels), "labelExpr": f"{json.dumps(labels)}[datum.value]"}}
    tips = [tip("label", "run"), tip("step"), tip("mean", "value", ".4g")]
    layers = [
        {"mark": {"type": "line", "strokeWidth": 1.8}, "encoding": {"y": mean_axis("value")}},
        {"mark": {"type": "point", "filled": True, "size": 10}, "encoding": {"y": mean_axis("value"), "tooltip": tips}},
    ]
    x = quantity("step", "step", axis={"grid": False, "tickCount": 6})
    spec = specification(points, layers, {"x": x, "color": colour}, "curve", curves[0])
    return Chart("live", "Runs in progress", "As logged, each step by itself.", spec, tuple(curves), "curve")


def _logged(file: Path) -> Iterator[tuple[str, int, float]]:
    """Yield (name, step, value) of the numbers in a file of JSON lines, without what cannot be read."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return
    for line in lines:
        try:
            values = json.loads(line)
            step = values["step"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue  # cut off by a kill
        for key, value in values.items() if is_finite(step) else ():
            if key != "step" and is_finite(value):
                yield clean(key), step, value

"""Compute the data of the page's charts and of the figures: a list of points a chart, in the table's unit (percent)."""

import json
import math
from collections.abc import Iterable, Mapping
from itertools import pairwise
from statistics import fmean
from typing import Any

from fpn_ablate.report.collate.cells import Contrast
from fpn_ablate.report.collate.table import Row, Table, clean
from fpn_ablate.utils.paths import METRICS

Point = dict[str, Any]
COLOURS = 8  # of Okabe and Ito: distinct for colour-blind readers
MAX_STEPS = 60  # points of a learning curve: more are not visible, and make the page heavy
MAX_EFFECTS = 16  # lines of the chart of effects; above that it shows the first metric only
NOT_A_LOSS = ("step", "lr")
COSTS = {
    "GFLOPs": ("verify.gflops", 1.0),
    "parameters (millions)": ("verify.params", 1e-6),
    "latency (ms)": ("cost.latency_ms", 1.0),
    "peak memory (MiB)": ("cost.peak_memory_mib", 1.0),
}


def colours(tables: Iterable[Table]) -> dict[str, dict[str, int]]:
    """Return {table: {row: number of its colour}}.

    A row keeps its colour in all tables, unless two rows of one table would then share it.
    """
    latest: dict[str, int] = {}
    by_table: dict[str, dict[str, int]] = {}
    for table in tables:
        rows = [row.row for row in table.rows if not row.published_only]
        used = {name: latest[name] for name in rows if name in latest}
        free = [number for number in range(COLOURS) if number not in used.values()]
        for position, name in enumerate(name for name in rows if name not in used):
            used[name] = free[position] if position < len(free) else position % COLOURS
            latest[name] = used[name]
        by_table[table.name] = {name: used[name] for name in rows}
    return by_table


def finished_rows(table: Table) -> list[Row]:
    """Return the rows with at least one finished seed."""
    return [row for row in table.rows if row.seeds]


def recall_by_size(table: Table) -> list[Point]:
    """Return AR@100 by object size, mean and extremes over seeds; the size bins are those of the first record that has any."""
    points: list[Point] = []
    edges: list[float] = []
    for row in finished_rows(table):
        bins = [record_bins for record in _finished(row) if (record_bins := _bins(record))]
        edges = edges or (bins[0][0] if bins else [])
        for number, (low, high) in enumerate(pairwise([edges[0] / 2**0.5, *edges, edges[-1] * 2**0.5]) if bins else ()):
            values = [100 * b[2][number] for b in bins if b[0] == edges and b[2][number] is not None]
            if values:
                objects = bins[0][1][number]
                size = f"{low:.0f}–{high:.0f} px" if 0 < number < len(edges) else _open_bin(edges, number)
                points.append(_point(row, values) | {"side": math.sqrt(low * high), "size": size, "objects": objects})
    return points


def size_bounds(table: Table) -> list[float]:
    """Return the sizes where small ends and large begins: the fifth edge and the last but two (runs.artifacts.by_size)."""
    for row in finished_rows(table):
        for record in _finished(row):
            if (bins := _bins(record)) and len(bins[0]) > 7:
                return [bins[0][4], bins[0][-3]]
    return []


def losses(table: Table, max_steps: int = MAX_STEPS) -> list[Point]:
    """Return each loss at up to `max_steps` steps: mean and extremes over the finished seeds whose folder is on this disk."""
    points = []
    for row in finished_rows(table):
        metrics = {key.removeprefix("metrics.") for record in row.records for key in record if key.startswith("metrics.")}
        values: dict[tuple[str, int], list[float]] = {}
        for seed in row.seeds:
            if seed in row.folders:
                for key, value in _logged_losses(row, seed, metrics):
                    values.setdefault(key, []).append(value)
        for loss in dict.fromkeys(loss for loss, _ in values):
            steps = sorted(step for other, step in values if other == loss)
            sampled = steps[:: math.ceil(len(steps) / max_steps)]
            points += [_point(row, values[loss, step], 4) | {"loss": loss, "step": step} for step in sampled]
    return points


def effects(table: Table) -> list[Point]:
    """Return the differences of the claims, then the effects of the definition."""
    names = {spec.names[0]: row for spec, row in zip(table.definition.rows, table.rows, strict=False)}
    titles = {metric.key: metric.title for metric in table.definition.metrics}
    points = []
    for verdict in table.verdicts:
        claim = verdict.claim
        if verdict.contrast is not None:
            sides = [" & ".join(_letter(names[n]) for n in side) for side in (claim.plus, claim.minus)]
            metric = titles[claim.metric] + (f" beyond {titles[claim.less]}" if claim.less else "")
            point = _effect(clean(claim.text), f"{sides[0]} − {sides[1]}", metric, verdict.contrast)
            points.append(point | {"verdict": verdict.verdict, "published": _rounded(verdict.published)})
    metrics = [m for m in table.definition.metrics if m.source is None and m.plot]
    for effect in table.effects:
        for metric in metrics if len(metrics) * len(table.effects) <= MAX_EFFECTS else metrics[:1]:
            cell = effect.cells[metric.key]
            if cell.ours.n:
                points.append(_effect(clean(effect.title), "", metric.title, cell) | {"verdict": "effect"})
    return [point | {"at": number} for number, point in enumerate(points)]


def costs(table: Table) -> list[Point]:
    """Return each kind of cost against the first metric; `right` says if a point lies in the right half of its kind."""
    metric, points = table.main_metric, []
    for row in finished_rows(table) if metric else ():
        cell = row.cells[metric.key].ours
        for kind, (key, scale) in COSTS.items():
            values = [v for record in _finished(row) if type(v := record.get(key)) in (int, float) and math.isfinite(v)]
            if values and cell.mean is not None:
                point = {"row": row.row, "label": row.name, "short": _letter(row), "cost": kind, "n": cell.n}
                figures = {"value": fmean(values) * scale, "mean": cell.mean, "low": cell.low, "high": cell.high}
                points.append(point | {key: _rounded(value, 4) for key, value in figures.items()})
    for kind in COSTS:
        of_kind = [point for point in points if point["cost"] == kind]
        middle = (min(p["value"] for p in of_kind) + max(p["value"] for p in of_kind)) / 2 if of_kind else 0.0
        for point in of_kind:
            point["right"] = point["value"] > middle
    return points


def _effect(title: str, sides: str, metric: str, difference: Contrast) -> Point:
    estimate = difference.ours
    values = {"mean": estimate.mean, "low": estimate.low, "high": estimate.high}
    values |= {"published": difference.published, "noise": difference.noise}
    rounded = {key: _rounded(value) for key, value in values.items()}
    labels = {"title": title, "contrast": sides, "metric": clean(metric)}
    return labels | rounded | {"within": difference.within_noise, "n": estimate.n}


def _point(row: Row, values: list[float], digits: int = 2) -> Point:
    spread = {"mean": fmean(values), "low": min(values), "high": max(values)}
    return {"row": row.row, "label": row.name, **{k: _rounded(v, digits) for k, v in spread.items()}, "n": len(values)}


def _letter(row: Row) -> str:
    return f"({row.letter})" if row.letter else clean(row.label)


def _finished(row: Row) -> list[dict[str, Any]]:
    return [record for record in row.records if record["seed"] in row.seeds]


def _bins(record: Mapping[str, Any]) -> tuple[list[float], list[int], list[float | None]] | None:
    """Return the size bins of a record (edges, objects, AR@100), or None if it has none or they are inconsistent."""
    parts = [record.get(f"by_size.{key}") for key in ("edges", "objects", "AR100")]
    if not all(isinstance(part, list) for part in parts) or not parts[0]:
        return None
    edges, objects, values = parts
    numbers = all(type(edge) in (int, float) and edge > 0 for edge in edges)
    numbers = numbers and all(value is None or (type(value) in (int, float) and abs(value) < 1e9) for value in values)
    return (edges, objects, values) if numbers and len(objects) == len(values) == len(edges) + 1 else None


def _open_bin(edges: list[float], number: int) -> str:
    return f"under {edges[0]:.0f} px" if number == 0 else f"over {edges[-1]:.0f} px"


def _logged_losses(row: Row, seed: int, metrics: set[str]) -> list[tuple[tuple[str, int], float]]:
    """Read ((loss, step), value) from a run's metrics.jsonl, skipping what cannot be read."""
    logged = []
    try:
        lines = (row.folders[seed] / METRICS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    for line in lines:
        try:
            values = json.loads(line)
            step = values["step"]
        except (ValueError, KeyError, TypeError):
            continue  # cut off by a kill
        for key, value in values.items():
            if key not in (*NOT_A_LOSS, *metrics) and type(value) in (int, float) and math.isfinite(value):
                logged.append(((clean(key), step), value))
    return logged


def _rounded(value: float | None, digits: int = 2) -> float | None:
    return None if value is None else round(value, digits)

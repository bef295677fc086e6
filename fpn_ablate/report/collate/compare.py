"""Compare the rows of a table: shared seeds, paired differences, noise of equal rows (A/A control) and best cells."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fpn_ablate.report.collate.cells import Cell, Contrast, contrast, logarithm, subtract_metric
from fpn_ablate.report.collate.definition import Definition
from fpn_ablate.report.collate.records import time_of
from fpn_ablate.report.collate.stats import LEVEL, Look, control_half_width, holm, looks
from fpn_ablate.report.collate.table import Row


@dataclass(frozen=True)
class Comparison:
    """A table's rows, keyed by the first of the names that a definition gives them, and the A/A control."""

    definition: Definition
    rows: Mapping[str, Row]
    control: Row | None = None

    def missing(self, names: Sequence[str], metrics: Sequence[str]) -> str | None:
        """Return the first row or metric that the table does not have, or None."""
        for name in names:
            if name not in self.rows:
                return f"row '{name}'"
        keys = {metric.key for metric in self.definition.metrics}
        return next((f"metric '{metric}'" for metric in metrics if metric not in keys), None)

    def seeds(self, names: Sequence[str]) -> list[int]:
        """Return the seeds that all these rows have finished.

        Empty if rows with several names stand under different ones of them: the difference would then be that of the names
        (of the backbones, say).
        """
        aliases = {spec.names[0]: spec.names for spec in self.definition.rows if len(spec.names) > 1}
        chosen = {aliases[name].index(self.rows[name].row) for name in names if name in aliases}
        if len(chosen) > 1:
            return []
        return sorted(set.intersection(*(set(self.rows[name].seeds) for name in names)))

    def contrast(
        self,
        metric: str,
        plus: Sequence[str],
        minus: Sequence[str],
        scale: float = 1.0,
        less: str | None = None,
        seeds: Sequence[int] | None = None,
        ratio: bool = False,
    ) -> Contrast:
        """Compute a difference of rows in one metric, minus their difference in the metric `less` if there is one.

        `seeds`: over these alone; by default over all that the rows share. `ratio`: of the logarithms, which is that of a ratio
        (of geometric means over rows and seeds).
        """
        cells = [[self._cell(self.rows[name], metric, less) for name in side] for side in (plus, minus)]
        sides = ([logarithm(cell) for cell in side] if ratio else side for side in cells)
        difference = contrast(*sides, self.seeds([*plus, *minus]) if seeds is None else seeds, scale)
        n = difference.ours.n
        unit = self._control_half_width(metric, less) if n and not ratio else None
        noise = None if unit is None else unit * math.sqrt(difference.squared_weights / n)
        of_images = any(m.key == metric and m.source is None for m in self.definition.metrics)  # a cost is not
        lacks_replicates = bool(n) and of_images and difference.ours.image_variance is None and self._has_replicates
        return replace(difference, noise=noise, lacks_replicates=lacks_replicates, ratio=ratio)

    def at_look(
        self, metric: str, plus: Sequence[str], minus: Sequence[str], less: str | None = None, ratio: bool = False
    ) -> tuple[Contrast, Look | None]:
        """Compute a difference over the seeds of the last look (`stats.looks`), and return it with that look.

        Seeds count in the order in which the last of these rows was started: in any other, a look's seeds would change as seeds
        come. With fewer than planned there is no look yet, and the difference is of all. Without a plan all seeds are the one
        look.
        """
        whole, planned = self.contrast(metric, plus, minus, less=less, ratio=ratio), self.definition.seeds
        if not planned:
            return whole, Look(1, whole.ours.n, 1.0)
        started = [{r["seed"]: time_of(r.get("started")) for r in self.rows[name].finished} for name in (*plus, *minus)]
        order = sorted(
            (seed for seed, value in whole.values.items() if value is not None),
            key=lambda seed: (max(times[seed] for times in started), seed),
        )
        complete = [look for look in looks(len(planned)) if look.seeds <= len(order)]
        if not complete:
            return whole, None
        of_look = sorted(order[: complete[-1].seeds])
        return self.contrast(metric, plus, minus, less=less, seeds=of_look, ratio=ratio), complete[-1]

    def p_value(self, metric: str, plus: Sequence[str], minus: Sequence[str]) -> float | None:
        """Return the two-sided p-value of a difference at its last look; None if it cannot be judged."""
        difference, look = self.at_look(metric, plus, minus)
        ours = difference.ours
        if look is None or ours.n < 2 or difference.lacks_replicates:
            return None
        return min(1.0, 2 * look.factor * min(ours.p_above(0.0), ours.p_below(0.0)))

    def noise(self) -> dict[str, float]:
        """Return {metric: how far two equal rows may differ by chance}, with as many seeds as the control's row has."""
        units = {m.key: self._control_half_width(m.key) for m in self.definition.metrics if m.source is None}
        return {key: unit * math.sqrt(2 / len(self._halves[0].seeds)) for key, unit in units.items() if unit is not None}

    def best(self) -> frozenset[tuple[str, str]]:
        """Return (row, metric) of each cell that is better than that of every other row, with Holm's correction over these."""
        best = set()
        for metric in self.definition.metrics:
            means = {name: row.cells[metric.key].ours.mean for name, row in self.rows.items() if row.seeds}
            means = {name: mean for name, mean in means.items() if mean is not None}
            if metric.source is not None or len(means) < 2:
                continue
            first = max(means, key=lambda name: means[name])
            others = [name for name in means if name != first]
            p_values = [self.p_value(metric.key, [first], [other]) for other in others]
            judged = None not in p_values and max(holm([p for p in p_values if p is not None])) < 1 - LEVEL
            if judged and all(self.contrast(metric.key, [first], [other]).ours.mean > 0 for other in others):  # on common seeds
                best.add((self.rows[first].row, metric.key))
        return frozenset(best)

    @property
    def _has_replicates(self) -> bool:
        return any(cell.resampled for row in self.rows.values() for cell in row.cells.values())

    @property
    def _halves(self) -> list[Row]:
        """Return the control's row with its own seeds and with the control's; none if it stands under another of its names."""
        first = self.rows.get(self.definition.control.row) if self.control else None
        return [first, self.control] if first and first.row == self.control.row and first.seeds and self.control.seeds else []

    def _control_half_width(self, metric: str, less: str | None = None) -> float | None:
        cells = [self._cell(row, metric, less) for row in self._halves]
        halves = [[value for value in cell.values.values() if value is not None] for cell in cells]
        return control_half_width(*halves) if halves else None

    @staticmethod
    def _cell(row: Row, metric: str, less: str | None) -> Cell:
        return subtract_metric(row.cells[metric], row.cells[less]) if less else row.cells[metric]

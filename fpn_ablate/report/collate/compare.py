"""Compare the rows of a table: shared seeds, paired differences, noise of equal rows (A/A control) and best cells."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fpn_ablate.report.collate.cells import Cell, Contrast, contrast, subtract_metric
from fpn_ablate.report.collate.definition import Definition
from fpn_ablate.report.collate.stats import control_half_width
from fpn_ablate.report.collate.table import Row


@dataclass(frozen=True)
class Comparison:
    """The rows that a definition lists, keyed by their first name, and the row trained again with control seeds (A/A)."""

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
        self, metric: str, plus: Sequence[str], minus: Sequence[str], scale: float = 1.0, less: str | None = None
    ) -> Contrast:
        """Compute a difference of rows in one metric, minus their difference in the metric `less` if there is one."""
        sides = ([self._cell(self.rows[name], metric, less) for name in side] for side in (plus, minus))
        difference = contrast(*sides, self.seeds([*plus, *minus]), scale)
        n = difference.ours.n
        unit = self._control_half_width(metric, less) if n else None
        noise = None if unit is None else unit * math.sqrt(difference.squared_weights / n)
        lacks_replicates = bool(n) and difference.ours.image_variance is None and self._has_replicates
        return replace(difference, noise=noise, lacks_replicates=lacks_replicates)

    def noise(self) -> dict[str, float]:
        """Return {metric: how far two equal rows may differ by chance}, with as many seeds as the control's row has."""
        units = {m.key: self._control_half_width(m.key) for m in self.definition.metrics if m.source is None}
        return {key: unit * math.sqrt(2 / len(self._halves[0].seeds)) for key, unit in units.items() if unit is not None}

    def best(self) -> frozenset[tuple[str, str]]:
        """Return (row, metric) of each cell whose differences to all other rows have intervals above 0."""
        best = set()
        for metric in self.definition.metrics:
            means = {name: row.cells[metric.key].ours.mean for name, row in self.rows.items() if row.seeds}
            means = {name: mean for name, mean in means.items() if mean is not None}
            if metric.source is not None or len(means) < 2:
                continue
            first = max(means, key=lambda name: means[name])
            if all(self.contrast(metric.key, [first], [other]).is_gain for other in means if other != first):
                best.add((self.rows[first].row, metric.key))
        return frozenset(best)

    @property
    def _has_replicates(self) -> bool:
        return any(cell.resampled for row in self.rows.values() for cell in row.cells.values())

    @property
    def _halves(self) -> list[Row]:
        """Return the control's row with its own seeds and with the control's; none if it stands under another of its names."""
        first = self.rows.get(self.definition.control.row) if self.control else None
        return [first, self.control] if first and first.row == self.control.row else []

    def _control_half_width(self, metric: str, less: str | None = None) -> float | None:
        cells = [self._cell(row, metric, less) for row in self._halves]
        halves = [[value for value in cell.values.values() if value is not None] for cell in cells]
        return control_half_width(*halves) if halves else None

    @staticmethod
    def _cell(row: Row, metric: str, less: str | None) -> Cell:
        return subtract_metric(row.cells[metric], row.cells[less]) if less else row.cells[metric]

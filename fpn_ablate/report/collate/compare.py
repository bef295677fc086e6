"""How the rows of a table are compared: which seeds they share, what equal rows differ by, and which cells are best."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fpn_ablate.report.collate.cells import Cell, Contrast, beyond, contrast
from fpn_ablate.report.collate.definition import Definition
from fpn_ablate.report.collate.stats import equal_rows
from fpn_ablate.report.collate.table import Row


@dataclass(frozen=True)
class Comparison:
    """The rows that a definition promises, by the first of their names, and the second half of the A/A control."""

    definition: Definition
    rows: Mapping[str, Row]
    control: Row | None = None

    def missing(self, names: Sequence[str], metrics: Sequence[str]) -> str | None:
        """The first row or metric that the table does not have."""
        for name in names:
            if name not in self.rows:
                return f"row '{name}'"
        known = {metric.key for metric in self.definition.metrics}
        return next((f"metric '{metric}'" for metric in metrics if metric not in known), None)

    def seeds(self, names: Sequence[str]) -> list[int]:
        """Those that all these rows have finished. None where the rows stand for different ones of their names: the difference
        would be that of the backbones, say, that the names stand for."""
        aliases = {spec.names[0]: spec.names for spec in self.definition.rows if len(spec.names) > 1}
        chosen = {aliases[name].index(self.rows[name].row) for name in names if name in aliases}
        if len(chosen) > 1:
            return []
        return sorted(set.intersection(*(set(self.rows[name].seeds) for name in names)))

    def contrast(
        self, metric: str, plus: Sequence[str], minus: Sequence[str], scale: float = 1.0, less: str | None = None
    ) -> Contrast:
        """A difference of rows in one metric, or in what it has beyond another (`less`)."""
        sides = ([self._cell(self.rows[name], metric, less) for name in side] for side in (plus, minus))
        found = contrast(*sides, self.seeds([*plus, *minus]), scale)
        noise = self._equal_rows(metric, less) if found.ours.n else None
        noise = None if noise is None else noise * math.sqrt(found.power / found.ours.n)
        return replace(found, noise=noise, blind=bool(found.ours.n) and found.ours.images is None and self._sees_images)

    def noise(self) -> dict[str, float]:
        """{metric: what two equal rows may differ by, with as many seeds as the control's row}."""
        if self.control is None or not self._first:
            return {}
        n = len(self._first.seeds)
        units = {m.key: self._equal_rows(m.key, None) for m in self.definition.metrics if m.source is None}
        return {key: unit * math.sqrt(2 / n) for key, unit in units.items() if unit is not None}

    def best(self) -> frozenset[tuple[str, str]]:
        """(row, metric) of the cells that are better than those of all other rows, as far as their intervals tell."""
        found = set()
        for metric in self.definition.metrics:
            means = {name: row.cells[metric.key].ours.mean for name, row in self.rows.items() if row.seeds}
            means = {name: mean for name, mean in means.items() if mean is not None}
            if metric.source is not None or len(means) < 2:
                continue
            first = max(means, key=lambda name: means[name])
            if all(self.contrast(metric.key, [first], [other]).is_gain for other in means if other != first):
                found.add((self.rows[first].row, metric.key))
        return frozenset(found)

    @property
    def _sees_images(self) -> bool:
        return any(cell.resampled for row in self.rows.values() for cell in row.cells.values())

    @property
    def _first(self) -> Row | None:
        """The first half of the control, if it is the same row as the second."""
        row = self.rows.get(self.definition.control.row) if self.definition.control else None
        return row if row and self.control and row.row == self.control.row else None

    def _equal_rows(self, metric: str, less: str | None) -> float | None:
        if self.control is None or self._first is None:
            return None
        halves = [self._cell(row, metric, less).values.values() for row in (self._first, self.control)]
        return equal_rows(*([value for value in half if value is not None] for half in halves))

    @staticmethod
    def _cell(row: Row, metric: str, less: str | None) -> Cell:
        return beyond(row.cells[metric], row.cells[less]) if less else row.cells[metric]

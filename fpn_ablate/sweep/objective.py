"""Read from a run's record the number that its job returns, by which a search proposes further trials."""

from collections.abc import Mapping
from typing import Any

from fpn_ablate.config.factors import flatten
from fpn_ablate.config.schema import Config
from fpn_ablate.report.collate.definition import Metric, find_definition
from fpn_ablate.sweep.publish import definition_folders
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.numbers import is_finite


def objective_column(cfg: Config, metrics: Mapping[str, Any] | None = None) -> Metric | None:
    """Return the column of a cell's table that `objective` names; the first metric if it names none.

    Args:
        metrics: those of the cell's record, which are the columns of a table without a file. Without them such a table has no
            column yet, and the result is None.

    Raises:
        UserError: the table has no such column.
    """
    columns = find_definition(cfg.table, metrics or (), definition_folders()).metrics
    if not cfg.objective:
        return next((column for column in columns if column.source is None), None)
    column = next((column for column in columns if column.key == cfg.objective), None)
    if column is None and columns:
        raise UserError(
            f"objective={cfg.objective}: {cfg.table} has no such column; it has {', '.join(column.key for column in columns)}"
        )
    return column


def objective(cfg: Config, record: Mapping[str, Any] | None) -> float | None:
    """Return the value of a run's objective, in the unit of its table; None without a record, or where it is undefined.

    Raises:
        UserError: the table has no such column.
    """
    if record is None:
        return None
    column = objective_column(cfg, record["metrics"])
    value = column.read(flatten(dict(record))) if column else None
    return value if is_finite(value) else None

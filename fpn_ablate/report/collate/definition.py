"""Read a table's definition from its file in `experiments/`: rows in order, columns, and the paper's figures as data."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fpn_ablate.utils.errors import UserError, short_repr
from fpn_ablate.utils.paths import EXPERIMENTS

STYLES = ("text", "count", "check")
SIZES = ("", "s", "m", "l")


@dataclass(frozen=True)
class Fact:
    """A column that describes a row.

    `source` is the record's key, as `verify.anchors`, or several keys joined by ` + `, whose values are printed joined the
    same way. `style` is one of STYLES.
    """

    key: str
    title: str
    source: str
    style: str = "text"


@dataclass(frozen=True)
class Metric:
    """A column of results: the record's `source`, or its `metrics.<key>`, printed times `scale` with `digits` decimals.

    Metrics are fractions. The value of another source is printed as it is and not plotted, unless the definition says so.
    """

    key: str
    title: str
    scale: float = 100.0
    digits: int = 1
    plot: bool = True
    source: str | None = None


@dataclass(frozen=True)
class RowSpec:
    """A row that the table lists. `published` maps facts and metrics to the paper's values, in the table's unit.

    Of several `names`, the first that has records is used. A `published_only` row has no line of ours.
    """

    names: tuple[str, ...]
    label: str
    letter: str | None = None
    published: dict[str, Any] = field(default_factory=dict)
    published_only: bool = False


@dataclass(frozen=True)
class Effect:
    """An effect: `scale` x (mean of the rows `plus` - mean of the rows `minus`), seed by seed; rows by their first name.

    With one row on each side it is a difference, with several a main effect: top-down = mean(with) - mean(without). An
    interaction is a difference of differences: of a (neither), b (the first alone), c (the second alone) and d (both) it is
    (d - c) - (b - a), which is plus [a, d], minus [b, c], scale 2. If it is above 0, each does more together with the other.
    """

    title: str
    plus: tuple[str, ...]
    minus: tuple[str, ...]
    scale: float = 1.0


@dataclass(frozen=True)
class Control:
    """An A/A control: `row` run again with `seeds` that no other row has. Its difference from itself is the harness's noise."""

    row: str
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Paper:
    """The source of the published figures: its reference, its name in tables, and the names of the data set that it used."""

    reference: str
    name: str = "paper"
    settings: str = ""
    data: str = "the paper's data"
    same_names: tuple[str, ...] = ()
    same_images: int | None = None


@dataclass(frozen=True)
class Definition:
    """A table's layout. A table without a file has a generic one, with `rows` and `metrics` from the records."""

    table: str
    title: str
    facts: tuple[Fact, ...]
    metrics: tuple[Metric, ...]
    rows: tuple[RowSpec, ...] = ()
    paper: Paper | None = None
    seeds: tuple[int, ...] = ()
    effects: tuple[Effect, ...] = ()
    notes: tuple[str, ...] = ()
    control: Control | None = None


def find_definition(table: str, metrics: Iterable[str], folders: Iterable[Path] = (EXPERIMENTS,)) -> Definition:
    """Return the definition of `table` from the file whose `table:` names it, or a generic one over `metrics`.

    A later folder overrides an earlier one.

    Raises:
        UserError: a file is not valid YAML or not a valid definition, or two files of a folder define the table.
    """
    for folder in reversed(list(folders)):
        contents = {file: read_yaml(file) for file in sorted(folder.glob("*.yaml"))}
        matches = {f: c for f, c in contents.items() if c and c.get("table") == table and "report" in c}
        if len(matches) > 1:
            raise UserError(f"table '{table}' is defined twice: {' and '.join(map(str, matches))}; keep one")
        for file, content in matches.items():
            return _parse(file, content)
    return _generic(table, metrics)


def _generic(table: str, metrics: Iterable[str]) -> Definition:
    """Return the layout of a table without a file: all metrics, each followed by its object sizes."""
    facts = (
        Fact("feature", "feature", "verify.feature"),
        Fact("anchors", "# anchors", "verify.anchors", "count"),
        Fact("lateral", "lateral?", "verify.lateral", "check"),
        Fact("top_down", "top-down?", "verify.top_down", "check"),
    )
    ordered = sorted(metrics, key=_metric_order)
    return Definition(table, table, facts, tuple(Metric(name, name) for name in ordered))


def _metric_order(name: str) -> tuple:
    base, _, size = name.partition("_")
    return base, SIZES.index(size) if size in SIZES else len(SIZES), size


def read_yaml(file: Path) -> dict[str, Any] | None:
    """Return the mapping in a file, or None if it holds something else.

    Raises:
        UserError: the file is not YAML.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except Exception as error:  # an unreadable file, or one of the many errors of yaml's conversions (dates, numbers, keys)
        raise UserError(f"{file}: cannot be read as YAML: {error}") from None
    return content if isinstance(content, dict) else None


def _parse(file: Path, content: dict[str, Any]) -> Definition:
    report = _inherit_columns(file, content["report"])
    optional = {"rows", "paper", "effects", "notes", "control"}
    report = check_mapping(f"{file}: report", report, {"title", "facts", "metrics"}, optional)
    facts = tuple(_fact(f"{file}: report.facts[{i}]", item) for i, item in enumerate(report["facts"]))
    metrics = tuple(_metric(f"{file}: report.metrics[{i}]", item) for i, item in enumerate(report["metrics"]))
    columns = [column.key for column in (*facts, *metrics)]
    keys = {*(fact.key for fact in facts)}, {*(metric.key for metric in metrics)}
    rows = tuple(_row(f"{file}: report.rows[{i}]", item, *keys) for i, item in enumerate(report.get("rows") or []))
    for kind, names in (("column", columns), ("row", [name for row in rows for name in row.names])):
        duplicates = sorted({name for name in names if names.count(name) > 1})
        if duplicates:
            raise UserError(f"{file}: {kind} '{duplicates[0]}' is listed twice")
    paper = _paper(f"{file}: report.paper", report["paper"]) if report.get("paper") else None
    if paper is None and any(row.published for row in rows):
        raise UserError(f"{file}: rows have published values, but report.paper names no source; add report.paper.reference")
    own_rows = {row.names[0] for row in rows if not row.published_only}
    effects = [_effect(f"{file}: report.effects[{i}]", item, own_rows) for i, item in enumerate(report.get("effects") or [])]
    title = text_value(file, report, "title")
    notes = report.get("notes") or []
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise UserError(f"{file}: report.notes must be a list of text, found {short_repr(notes)}")
    seeds, effects = _seeds(content), tuple(effects)
    control = _control(f"{file}: report.control", report["control"], own_rows, seeds) if report.get("control") else None
    return Definition(content["table"], title, facts, metrics, rows, paper, seeds, effects, tuple(notes), control)


def _inherit_columns(file: Path, report: Any) -> Any:
    """Replace `columns: NAME` by the facts, metrics and notes of NAME.yaml beside `file`, except those that `report` has."""
    if not isinstance(report, dict) or "columns" not in report:
        return report
    source = file.with_name(f"{text_value(f'{file}: report', report, 'columns')}.yaml")
    other = (read_yaml(source) or {}).get("report")
    if not isinstance(other, dict) or not {"facts", "metrics"} <= set(other):
        raise UserError(f"{file}: report.columns: {source} must have a report with its own facts and metrics")
    return {key: other[key] for key in ("facts", "metrics", "notes") if key in other} | {
        key: report[key] for key in report if key != "columns"
    }


def _fact(where: str, item: Any) -> Fact:
    item = check_mapping(where, item, {"key", "from"}, {"title", "style"})
    style = item.get("style", "text")
    if style not in STYLES:
        raise UserError(f"{where}: style {short_repr(style)} is not one of {', '.join(STYLES)}")
    return Fact(text_value(where, item, "key"), str(item.get("title", item["key"])), text_value(where, item, "from"), style)


def _metric(where: str, item: Any) -> Metric:
    item = check_mapping(where, item, {"key"}, {"title", "scale", "digits", "plot", "from"})
    source = text_value(where, item, "from") if "from" in item else None
    scale, digits = item.get("scale", 1.0 if source else 100.0), item.get("digits", 1)
    if not is_number(scale) or type(digits) is not int or digits < 0:
        raise UserError(f"{where}: scale must be a number and digits an integer of 0 or more")
    key = text_value(where, item, "key")
    return Metric(key, str(item.get("title", key)), float(scale), digits, bool(item.get("plot", not source)), source)


def _row(where: str, item: Any, facts: set[str], metrics: set[str]) -> RowSpec:
    item = check_mapping(where, item, {"row"}, {"label", "letter", "published", "published_only"})
    names = item["row"] if isinstance(item["row"], list) and item["row"] else [item["row"]]
    names = tuple(text_value(where, {"row": name}, "row") for name in names)
    published = check_mapping(f"{where}.published", item.get("published") or {}, set(), facts | metrics)
    for key, value in published.items():
        if key in metrics and value is not None and not is_number(value):
            raise UserError(f"{where}.published.{key}: must be a number or null, found {short_repr(value)}")
    letter = text_value(where, item, "letter") if item.get("letter") is not None else None
    only = item.get("published_only", False)
    if type(only) is not bool or (only and not published):
        raise UserError(f"{where}: published_only must be true or false, and true only with published values")
    return RowSpec(names, str(item.get("label", names[0])), letter, published, only)


def _effect(where: str, item: Any, rows: set[str]) -> Effect:
    item = check_mapping(where, item, {"title", "plus", "minus"}, {"scale"})
    for side in ("plus", "minus"):
        names = item[side] if isinstance(item[side], list) else []
        unknown = [name for name in names if name not in rows]
        if unknown or not names:
            wrong = short_repr(unknown[0] if unknown else item[side])
            raise UserError(f"{where}.{side}: must list rows by their first name, {', '.join(sorted(rows))}; found {wrong}")
    if not is_number(item.get("scale", 1.0)):
        raise UserError(f"{where}: scale must be a number, found {short_repr(item['scale'])}")
    return Effect(text_value(where, item, "title"), tuple(item["plus"]), tuple(item["minus"]), float(item.get("scale", 1.0)))


def _control(where: str, item: Any, rows: set[str], table_seeds: tuple[int, ...]) -> Control:
    item = check_mapping(where, item, {"row", "seeds"}, set())
    row, seeds = text_value(where, item, "row"), item["seeds"]
    if row not in rows:
        raise UserError(f"{where}.row: unknown row '{row}'; choose one of {', '.join(sorted(rows))}")
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise UserError(f"{where}.seeds: must be a list of integers, found {short_repr(seeds)}")
    if both := set(seeds) & set(table_seeds):
        raise UserError(
            f"{where}.seeds: the table uses {', '.join(map(str, sorted(both)))} itself; give the control other seeds"
        )
    return Control(row, tuple(seeds))


def _paper(where: str, item: Any) -> Paper:
    item = check_mapping(where, item, {"reference"}, {"name", "settings", "data", "same_data"})
    same = check_mapping(f"{where}.same_data", item.get("same_data") or {}, set(), {"names", "images"})
    names = tuple(str(name).casefold() for name in same.get("names") or ())
    name, data = str(item.get("name", Paper.name)), str(item.get("data", Paper.data))
    return Paper(text_value(where, item, "reference"), name, str(item.get("settings", "")), data, names, same.get("images"))


def _seeds(content: dict[str, Any]) -> tuple[int, ...]:
    """Return the seeds of the sweep in the same file, if they are a plain list; else an empty tuple."""
    node: Any = content
    for key in ("hydra", "sweeper", "params", "seed"):
        node = node.get(key) if isinstance(node, dict) else None
    parts = str("" if node is None else node).split(",")
    return tuple(int(part) for part in parts) if all(part.strip().isdecimal() for part in parts) else ()


def check_mapping(where: str, value: Any, required: set[str], optional: set[str]) -> dict[str, Any]:
    """Return `value` after checking that it is a mapping with all `required` keys and no others than `optional` ones."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: must be a mapping, found {short_repr(value)}")
    missing, unknown = sorted(required - set(value)), [key for key in value if key not in required | optional]
    if missing or unknown:
        problem = f"missing key '{missing[0]}'" if missing else f"unknown key '{unknown[0]}'"
        raise UserError(f"{where}: {problem}; allowed: {', '.join(sorted(required | optional))}")
    return value


def text_value(where: Any, item: dict[str, Any], key: str) -> str:
    """Return the text under `key`.

    YAML reads a bare `no` as false and a bare `1` as a number: a row of that name would never match a record.
    """
    if not isinstance(item[key], str):
        raise UserError(f"{where}: {key} must be text, found {short_repr(item[key])}; put it in quotation marks")
    return item[key]


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)

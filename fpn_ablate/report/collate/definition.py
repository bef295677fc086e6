"""What a table shows, read from its file in `experiments/`: rows in order, columns, and the paper's figures as data."""

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
    """A column that describes a row. `source` is the record's key, as `verify.anchors`, or several
    joined by ` + `, which are shown so; `style` one of STYLES."""

    key: str
    title: str
    source: str
    style: str = "text"


@dataclass(frozen=True)
class Metric:
    """A column of results: `source` in the records, else their `metrics.<key>`, shown times `scale` with `digits` decimals.

    Metrics are fractions; another source is shown as it is, and not plotted, unless the definition says so.
    """

    key: str
    title: str
    scale: float = 100.0
    digits: int = 1
    plot: bool = True
    source: str | None = None


@dataclass(frozen=True)
class RowSpec:
    """A row the table promises. `published` maps facts and metrics to the paper's values, in the table's unit.

    Of several `names`, the first that has records stands. A row that is `published_only` has no line of ours.
    """

    names: tuple[str, ...]
    label: str
    letter: str | None = None
    published: dict[str, Any] = field(default_factory=dict)
    published_only: bool = False


@dataclass(frozen=True)
class Effect:
    """`scale` x (mean of the rows `plus` - mean of the rows `minus`), seed by seed; rows by the first of their names.

    With one row each it is a difference, with several a main effect: top-down = mean(with) - mean(without). An interaction is
    a difference of differences: of a (neither), b (the first alone), c (the second alone) and d (both) it is (d - c) - (b - a),
    which is plus [a, d], minus [b, c], scale 2. Above 0, each does more where the other is.
    """

    title: str
    plus: tuple[str, ...]
    minus: tuple[str, ...]
    scale: float = 1.0


@dataclass(frozen=True)
class Control:
    """An A/A control: `row` again with `seeds` that no other row has. What it differs from itself is the harness's noise."""

    row: str
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Paper:
    """Where the published figures come from, what tables call that source, and which of our data sets are its own."""

    reference: str
    name: str = "paper"
    settings: str = ""
    data: str = "the paper's data"
    same_names: tuple[str, ...] = ()
    same_images: int | None = None


@dataclass(frozen=True)
class Definition:
    """A table's layout. Without a file it is generic: `rows` and `metrics` are then taken from the records."""

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


def find(table: str, metrics: Iterable[str], folders: Iterable[Path] = (EXPERIMENTS,)) -> Definition:
    """The definition of `table`: from the file whose `table:` names it, else a generic one over the `metrics` found.

    What a later folder defines stands for what an earlier one does.

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
    return generic(table, metrics)


def generic(table: str, metrics: Iterable[str]) -> Definition:
    """A layout for a table without a file: all metrics found, sizes behind their own metric."""
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
    """The mapping in a file, None where it holds another thing. Raises UserError where it is no YAML."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except Exception as error:  # yaml makes dates, numbers and keys of what it reads, and meets whatever is there
        raise UserError(f"{file}: cannot be read as YAML: {error}") from None
    return content if isinstance(content, dict) else None


def _parse(file: Path, content: dict[str, Any]) -> Definition:
    report = _with_columns(file, content["report"])
    report = mapping(f"{file}: report", report, {"title", "facts", "metrics"}, {"rows", "paper", "effects", "notes", "control"})
    facts = tuple(_fact(f"{file}: report.facts[{i}]", item) for i, item in enumerate(report["facts"]))
    metrics = tuple(_metric(f"{file}: report.metrics[{i}]", item) for i, item in enumerate(report["metrics"]))
    columns = [column.key for column in (*facts, *metrics)]
    known = {*(fact.key for fact in facts)}, {*(metric.key for metric in metrics)}
    rows = tuple(_row(f"{file}: report.rows[{i}]", item, *known) for i, item in enumerate(report.get("rows") or []))
    for kind, names in (("column", columns), ("row", [name for row in rows for name in row.names])):
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UserError(f"{file}: {kind} '{twice[0]}' stands there twice")
    paper = _paper(f"{file}: report.paper", report["paper"]) if report.get("paper") else None
    if paper is None and any(row.published for row in rows):
        raise UserError(f"{file}: rows have published values but report.paper names no source")
    ours = {row.names[0] for row in rows if not row.published_only}
    effects = [_effect(f"{file}: report.effects[{i}]", item, ours) for i, item in enumerate(report.get("effects") or [])]
    title = text_of(file, report, "title")
    notes = report.get("notes") or []
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise UserError(f"{file}: report.notes must be a list of text, found {short_repr(notes)}")
    seeds, effects = _seeds(content), tuple(effects)
    control = _control(f"{file}: report.control", report["control"], ours, seeds) if report.get("control") else None
    return Definition(content["table"], title, facts, metrics, rows, paper, seeds, effects, tuple(notes), control)


def _with_columns(file: Path, report: Any) -> Any:
    """`columns: NAME` stands for the facts, metrics and notes of NAME.yaml beside `file`, where it has none of its own."""
    if not isinstance(report, dict) or "columns" not in report:
        return report
    source = file.with_name(f"{text_of(f'{file}: report', report, 'columns')}.yaml")
    other = (read_yaml(source) or {}).get("report")
    if not isinstance(other, dict) or not {"facts", "metrics"} <= set(other):
        raise UserError(f"{file}: report.columns: {source} has no report with facts and metrics of its own")
    return {key: other[key] for key in ("facts", "metrics", "notes") if key in other} | {
        key: report[key] for key in report if key != "columns"
    }


def _fact(where: str, item: Any) -> Fact:
    item = mapping(where, item, {"key", "from"}, {"title", "style"})
    style = item.get("style", "text")
    if style not in STYLES:
        raise UserError(f"{where}: style {short_repr(style)} is not one of {', '.join(STYLES)}")
    return Fact(text_of(where, item, "key"), str(item.get("title", item["key"])), text_of(where, item, "from"), style)


def _metric(where: str, item: Any) -> Metric:
    item = mapping(where, item, {"key"}, {"title", "scale", "digits", "plot", "from"})
    source = text_of(where, item, "from") if "from" in item else None
    scale, digits = item.get("scale", 1.0 if source else 100.0), item.get("digits", 1)
    if not is_number(scale) or type(digits) is not int or digits < 0:
        raise UserError(f"{where}: scale must be a number and digits an integer of 0 or more")
    key = text_of(where, item, "key")
    return Metric(key, str(item.get("title", key)), float(scale), digits, bool(item.get("plot", not source)), source)


def _row(where: str, item: Any, facts: set[str], metrics: set[str]) -> RowSpec:
    item = mapping(where, item, {"row"}, {"label", "letter", "published", "published_only"})
    names = item["row"] if isinstance(item["row"], list) and item["row"] else [item["row"]]
    names = tuple(text_of(where, {"row": name}, "row") for name in names)
    published = mapping(f"{where}.published", item.get("published") or {}, set(), facts | metrics)
    for key, value in published.items():
        if key in metrics and value is not None and not is_number(value):
            raise UserError(f"{where}.published.{key}: must be a number or null, found {short_repr(value)}")
    letter = text_of(where, item, "letter") if item.get("letter") is not None else None
    only = item.get("published_only", False)
    if type(only) is not bool or (only and not published):
        raise UserError(f"{where}: published_only must be true or false, and true only with published values")
    return RowSpec(names, str(item.get("label", names[0])), letter, published, only)


def _effect(where: str, item: Any, rows: set[str]) -> Effect:
    item = mapping(where, item, {"title", "plus", "minus"}, {"scale"})
    for side in ("plus", "minus"):
        names = item[side] if isinstance(item[side], list) else []
        unknown = [name for name in names if name not in rows]
        if unknown or not names:
            found = f"found {short_repr(unknown[0] if unknown else item[side])}"
            raise UserError(f"{where}.{side}: must list rows of ours by their first names, {', '.join(sorted(rows))}; {found}")
    if not is_number(item.get("scale", 1.0)):
        raise UserError(f"{where}: scale must be a number, found {short_repr(item['scale'])}")
    return Effect(text_of(where, item, "title"), tuple(item["plus"]), tuple(item["minus"]), float(item.get("scale", 1.0)))


def _control(where: str, item: Any, rows: set[str], taken: tuple[int, ...]) -> Control:
    item = mapping(where, item, {"row", "seeds"}, set())
    row, seeds = text_of(where, item, "row"), item["seeds"]
    if row not in rows:
        raise UserError(f"{where}.row: no row of ours is called '{row}'; there are {', '.join(sorted(rows))}")
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise UserError(f"{where}.seeds: must be a list of integers, found {short_repr(seeds)}")
    if both := set(seeds) & set(taken):
        raise UserError(f"{where}.seeds: {', '.join(map(str, sorted(both)))} are the table's own; a control has others")
    return Control(row, tuple(seeds))


def _paper(where: str, item: Any) -> Paper:
    item = mapping(where, item, {"reference"}, {"name", "settings", "data", "same_data"})
    same = mapping(f"{where}.same_data", item.get("same_data") or {}, set(), {"names", "images"})
    names = tuple(str(name).casefold() for name in same.get("names") or ())
    name, data = str(item.get("name", Paper.name)), str(item.get("data", Paper.data))
    return Paper(text_of(where, item, "reference"), name, str(item.get("settings", "")), data, names, same.get("images"))


def _seeds(content: dict[str, Any]) -> tuple[int, ...]:
    """Seeds that the sweep in the same file asks for, where they are a plain list."""
    node: Any = content
    for key in ("hydra", "sweeper", "params", "seed"):
        node = node.get(key) if isinstance(node, dict) else None
    parts = str("" if node is None else node).split(",")
    return tuple(int(part) for part in parts) if all(part.strip().isdecimal() for part in parts) else ()


def mapping(where: str, value: Any, required: set[str], optional: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: must be a mapping, found {short_repr(value)}")
    missing, unknown = sorted(required - set(value)), [key for key in value if key not in required | optional]
    if missing or unknown:
        problem = f"lacks '{missing[0]}'" if missing else f"does not know '{unknown[0]}'"
        raise UserError(f"{where}: {problem}; allowed: {', '.join(sorted(required | optional))}")
    return value


def text_of(where: Any, item: dict[str, Any], key: str) -> str:
    # YAML reads a bare `no` as false and a bare `1` as a number: a row of that name would never match a record.
    if not isinstance(item[key], str):
        raise UserError(f"{where}: {key} must be text, found {short_repr(item[key])}; put it in quotation marks")
    return item[key]


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)

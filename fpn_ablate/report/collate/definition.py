"""Read a table's definition from its file in `experiments/`: rows in order, columns, and the paper's figures as data."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, model_validator

from fpn_ablate.report.collate.stats import MAX_SEEDS
from fpn_ablate.utils.errors import UserError, short_repr
from fpn_ablate.utils.numbers import is_finite
from fpn_ablate.utils.paths import EXPERIMENTS

SIZES = ("", "s", "m", "l")
BASELINE = "fpn"  # of tables whose definition names none


def _text(value: Any) -> str:
    """Refuse what is no text: YAML reads a bare `no` as false and a bare `1` as a number, and no record has such a row."""
    if not isinstance(value, str):
        raise ValueError(f"must be text, found {short_repr(value)}; put it in quotation marks")
    return value


def _number(value: Any) -> float:
    """Refuse what is no finite number; the bare `no` is not 0, and an integer stays one."""
    if not is_finite(value):
        raise ValueError(f"must be a number, found {short_repr(value)}")
    return value


Text = Annotated[str, PlainValidator(_text)]
Names = Annotated[tuple[Text, ...], Field(min_length=1)]
Number = Annotated[float, PlainValidator(_number)]
Whole = Annotated[int, Field(strict=True)]  # pydantic would read "3" and true
Flag = Annotated[bool, Field(strict=True)]


class Entry(BaseModel):
    """A mapping in a file."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False, validate_by_name=True, validate_by_alias=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, value: Any) -> Any:
        allowed = sorted(field.alias or name for name, field in cls.model_fields.items())
        for key in value if isinstance(value, dict) else ():
            if key not in allowed and key not in cls.model_fields:
                raise ValueError(f"unknown key {short_repr(key)}; allowed: {', '.join(allowed)}")
        return value


class Fact(Entry):
    """A column that describes a row.

    `source` is the record's key, as `verify.anchors`, or several keys joined by ` + `, whose values are printed joined the
    same way.
    """

    key: Text
    title: Text = Field(default_factory=lambda fact: fact.get("key"))
    source: Text = Field(alias="from")
    style: Literal["text", "count", "check"] = "text"


class Metric(Entry):
    """A column of results: the record's `source`, or its `metrics.<key>`, printed times `scale` with `digits` decimals.

    `instead`: the metric that is read of records that have it, as proposal_AR1k of detectors beside the AR1k of RPNs.
    Metrics are fractions. The value of another source is printed as it is and not plotted, unless the definition says so.
    """

    key: Text
    title: Text = Field(default_factory=lambda metric: metric.get("key"))
    source: Text | None = Field(None, alias="from")
    instead: Text | None = None
    scale: Number = Field(default_factory=lambda metric: 1.0 if metric.get("source") else 100.0)
    digits: Whole = Field(1, ge=0)
    plot: Flag = Field(default_factory=lambda metric: not metric.get("source"))

    def name_in(self, record: Mapping[str, Any]) -> str:
        """Return the name of the metric that is read of a flat record: `instead` if it has that, else `key`."""
        return self.instead if self.instead and record.get(f"metrics.{self.instead}") is not None else self.key

    def read(self, record: Mapping[str, Any]) -> float | None:
        """Return the value of a flat record in the table's unit; None if it has none."""
        value = record.get(self.source or f"metrics.{self.name_in(record)}")
        return value * self.scale if type(value) in (int, float) else None


class RowSpec(Entry):
    """A row that the table lists. `published` maps facts and metrics to the paper's values, in the table's unit.

    Of several `names`, the first that has records is used. A `published_only` row has no line of ours.
    """

    names: Names = Field(alias="row")
    label: Text = Field(default_factory=lambda row: row.get("names", [""])[0])
    letter: Text | None = None
    published: dict[str, Any] = {}
    published_only: Flag = False

    @model_validator(mode="before")
    @classmethod
    def _one_name(cls, value: Any) -> Any:
        single = isinstance(value, dict) and not isinstance(value.get("row", []), list)
        return value | {"row": [value["row"]]} if single else value


class Effect(Entry):
    """An effect: `scale` x (mean of the rows `plus` - mean of the rows `minus`), seed by seed; rows by their first name.

    With one row on each side it is a difference, with several a main effect: top-down = mean(with) - mean(without). An
    interaction is a difference of differences: of a (neither), b (the first alone), c (the second alone) and d (both) it is
    (d - c) - (b - a), which is plus [a, d], minus [b, c], scale 2. If it is above 0, each does more together with the other.
    """

    title: Text
    plus: Names
    minus: Names
    scale: Number = 1.0


class Control(Entry):
    """An A/A control: `row` run again with `seeds` that no other row has. Its difference from itself is the harness's noise."""

    row: Text
    seeds: Annotated[tuple[Whole, ...], Field(min_length=1)]


class SameData(Entry):
    """Names of the data set that the paper used, and how many images of it."""

    names: tuple[Text, ...] = ()
    images: Whole | None = None


class Paper(Entry):
    """The source of the published figures: its reference, its name in tables, and the data set that it used."""

    reference: Text
    name: Text = "paper"
    settings: Text = ""
    data: Text = "the paper's data"
    same_data: SameData = SameData()


class Definition(Entry):
    """A table's layout: `report` of its file. A table without a file has a generic one, with all metrics of the records."""

    table: Text
    title: Text
    facts: tuple[Fact, ...]
    metrics: tuple[Metric, ...]
    rows: tuple[RowSpec, ...] = ()
    paper: Paper | None = None
    seeds: tuple[int, ...] = ()
    effects: tuple[Effect, ...] = ()
    notes: tuple[Text, ...] = ()
    control: Control | None = None
    baseline: Text | None = None  # the row from which the others' differences are taken; `fpn` where there is one

    @model_validator(mode="after")
    def _rows_and_columns_exist(self) -> Self:
        columns, metrics = [column.key for column in (*self.facts, *self.metrics)], {metric.key for metric in self.metrics}
        for kind, names in (("column", columns), ("row", [name for row in self.rows for name in row.names])):
            if duplicates := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{kind} '{duplicates[0]}' is listed twice")
        for row in self.rows:
            for key, value in row.published.items():
                if key not in columns:
                    raise ValueError(f"row '{row.names[0]}': published {short_repr(key)} is no column of {', '.join(columns)}")
                if key in metrics and value is not None and not is_finite(value):
                    raise ValueError(f"row '{row.names[0]}': published {key} must be a number or null, found {value!r}")
            if row.published_only and not row.published:
                raise ValueError(f"row '{row.names[0]}': published_only may be true only with published values")
        if self.paper is None and any(row.published for row in self.rows):
            raise ValueError("rows have published values, but paper names no source; add report.paper.reference")
        return self

    @model_validator(mode="after")
    def _effects_and_control_name_rows(self) -> Self:
        own = sorted(row.names[0] for row in self.rows if not row.published_only)
        named = [(f"effects[{k}]", name) for k, effect in enumerate(self.effects) for name in (*effect.plus, *effect.minus)]
        named += [("control", self.control.row)] if self.control else []
        for where, name in [*named, *([("baseline", self.baseline)] if self.baseline else [])]:
            if name not in own:
                raise ValueError(f"{where}: unknown row '{name}'; choose by their first name: {', '.join(own)}")
        if both := set(self.control.seeds if self.control else ()) & set(self.seeds):
            seeds = ", ".join(map(str, sorted(both)))
            raise ValueError(f"control.seeds: the table uses {seeds} itself; give the control other seeds")
        return self


Model = TypeVar("Model", bound=Entry)
# libyaml's where PyYAML was built with it: a tenth of the time, and each table reads all files.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def parse(model: type[Model], where: str, value: Any) -> Model:
    """Validate a part of a file. Raises UserError with the first problem's place, value and what is allowed."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        problem = error.errors()[0]
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"])
        text = problem["msg"].removeprefix("Value error, ")
        shown = "" if problem["type"] in ("missing", "value_error") else f", found {short_repr(problem['input'])}"
        raise UserError(f"{where}{place}: {text[:1].lower()}{text[1:]}{shown}") from None


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
            report = _inherit_columns(file, content["report"])
            more = {"table": table, "seeds": _seeds(content)}
            return parse(Definition, f"{file}: report", report | more if isinstance(report, dict) else report)
    return _generic(table, metrics)


def _generic(table: str, metrics: Iterable[str]) -> Definition:
    """Return the layout of a table without a file: all metrics, each followed by its object sizes."""
    facts = (
        Fact(key="feature", source="verify.feature"),
        Fact(key="anchors", title="# anchors", source="verify.anchors", style="count"),
        Fact(key="lateral", title="lateral?", source="verify.lateral", style="check"),
        Fact(key="top_down", title="top-down?", source="verify.top_down", style="check"),
    )
    ordered = sorted(metrics, key=_metric_order)
    return Definition(table=table, title=table, facts=facts, metrics=tuple(Metric(key=name) for name in ordered))


def _metric_order(name: str) -> tuple:
    base, _, size = name.rpartition("_")
    return (base, SIZES.index(size)) if size in SIZES[1:] else (name, 0)


def read_yaml(file: Path) -> dict[str, Any] | None:
    """Return the mapping in a file, or None if it holds something else.

    Raises:
        UserError: the file is not YAML.
    """
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _LOADER)
    except Exception as error:  # an unreadable file, or one of the many errors of yaml's conversions (dates, numbers, keys)
        raise UserError(f"{file}: cannot be read as YAML: {error}") from None
    return content if isinstance(content, dict) else None


def _inherit_columns(file: Path, report: Any) -> Any:
    """Replace `columns: NAME` by facts, metrics and notes of NAME.yaml, beside `file` or ours, where `report` has none."""
    if not isinstance(report, dict) or "columns" not in report:
        return report
    places = [folder / f"{report['columns']}.yaml" for folder in dict.fromkeys((file.parent, EXPERIMENTS))]
    source = next((place for place in places if place.exists()), None)
    if source is None:
        raise UserError(
            f"{file}: report.columns={short_repr(report['columns'])}: there is no {' and no '.join(map(str, places))}"
        )
    other = (read_yaml(source) or {}).get("report")
    if not isinstance(other, dict) or not {"facts", "metrics"} <= set(other):
        raise UserError(f"{file}: report.columns: {source} must have a report with its own facts and metrics")
    inherited = {key: other[key] for key in ("facts", "metrics", "notes") if key in other}
    return inherited | {key: value for key, value in report.items() if key != "columns"}


def _seeds(content: dict[str, Any]) -> tuple[int, ...]:
    """Return the seeds of the sweep in the same file, written as a list or a range of Hydra's (0,1 or range(2,5)); else ()."""
    node: Any = content
    for key in ("hydra", "sweeper", "params", "seed"):
        node = node.get(key) if isinstance(node, dict) else None
    match = re.fullmatch(r"\s*(?:(range|choice)\()?(\s*\d{1,9}\s*(?:,\s*\d{1,9}\s*)*)(?(1)\))\s*", str(node), re.ASCII)
    if not match:
        return ()
    seeds: Sequence[int] = [int(part) for part in match[2].split(",")]
    if match[1] == "range":
        seeds = range(*seeds) if len(seeds) < 3 or (len(seeds) == 3 and seeds[2]) else ()
    return tuple(dict.fromkeys(seeds)) if len(seeds) <= MAX_SEEDS else ()

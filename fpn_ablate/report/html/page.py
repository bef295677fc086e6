"""Render collated tables as one HTML file that opens without a network.

`templates/` has its text, style and script. Jinja escapes everything that comes from records.
"""

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from fpn_ablate.report.collate.claims import ICONS
from fpn_ablate.report.collate.table import Record, Row, Table, clean
from fpn_ablate.report.formats.grid import grid
from fpn_ablate.report.html import charts, gallery
from fpn_ablate.report.html.curves import MAX_STEPS
from fpn_ablate.report.html.progress import MARKS, Progress
from fpn_ablate.report.html.vega import Chart

TEMPLATES = Path(__file__).with_name("templates")
RELOAD = 15  # seconds between reloads while a sweep is running


def render(tables: Sequence[Table], *, progress: Progress | None = None) -> str:
    """Render the page of these tables. With `progress` it shows that first and reloads itself."""
    tables = sorted(tables, key=lambda table: not table.published)  # the paper's tables first
    album = gallery.Album()
    colours = charts.row_colours(tables)
    steps = max(12, min(MAX_STEPS, 400 // max(len(tables), 1)))  # the curves of many tables would take megabytes
    sections = [_section(table, colours[table.name], album, number, steps) for number, table in enumerate(tables, start=1)]
    sheets = gallery.sheets(album)
    has_charts = any(section["charts"] for section in sections) or (progress is not None and progress.curves is not None)
    style, scripts = source("page.css"), [*([_vega()] if has_charts else []), source("page.js")]
    runs = [(table, row, record) for table in tables for row in table.all_rows for record in row.records]
    return _environment().get_template("page.html.j2").render(
        title=clean(tables[0].definition.title) if len(tables) == 1 else "Ablations of the feature pyramid",
        sections=sections,
        sheets=sheets,
        album=album,
        progress=progress,
        reload=RELOAD,
        newest=max((str(r.get("finished") or "") for t in tables for row in t.rows for r in row.records), default=""),
        runs=[_run(*run) for run in runs],
        configurations=_configurations([record for *_, record in runs]),
        style=style,
        scripts=scripts,
        policy=_policy(style, scripts),
    )  # fmt: skip


def _section(table: Table, colours: dict[str, int], album: gallery.Album, number: int, steps: int) -> dict[str, Any]:
    """Build the template's values for one table."""
    content = grid(table)
    space = charts.too_little_space()
    charts_or_reasons = [f"No charts: {space}."] if space else charts.charts(table, colours, steps)
    artifacts = gallery.load_artifacts(table, album)
    comparison, pyramid = gallery.gallery(artifacts, album, colours), gallery.pyramid(artifacts, album, colours)
    missing = [item for item in charts_or_reasons if isinstance(item, str)]
    verdicts = Counter(verdict.verdict for verdict in table.verdicts)
    seeds = sorted({*table.definition.seeds, *(seed for row in table.rows for seed in row.states)})
    commands = [record.get("environment.command") for row in table.all_rows for record in row.records]
    if album.full and not (comparison and pyramid) and artifacts.runs:
        name = table.definition.table
        missing.append(f"Some pictures are left out to keep the page small. A page made with --table {name} has them.")
    return {
        "id": f"t{number}",
        "table": table,
        "content": content,
        "verdicts": list(zip(table.verdicts, content.verdicts, strict=True)),
        "counts": [(word, verdicts[word]) for word in ICONS if verdicts[word]],
        "seeds": lambda row: [(seed, row.states.get(seed, "not run")) for seed in seeds],
        "colours": colours,
        "names": {row.row: row.name for row in table.rows},
        "charts": [item for item in charts_or_reasons if isinstance(item, Chart)],
        "missing": missing,
        "artifacts": artifacts,
        "gallery": comparison,
        "pyramid": pyramid,
        "kind": _kind(table),
        "runs": sum(len(row.records) for row in table.all_rows),
        "commands": Counter(map(clean, filter(None, commands))).most_common(),  # as users typed them, with the number of runs
    }


def _kind(table: Table) -> str:
    """Name the kind of a table's data, which the page marks by a colour."""
    if table.generated:
        return "generated"
    return "COCO" if table.same_data or "coco" in table.data.lower() else "real"


def _run(table: Table, row: Row, record: Record) -> dict[str, str]:
    """Return the cells of a run in the table of all runs, by header."""
    commit = record.get("environment.commit")
    seconds = [record.get(f"cost.{key}") for key in ("proposals_s", "train_s", "eval_s")]
    spent = sum(value for value in seconds if type(value) in (int, float))
    metric = table.main_metric
    value = metric.read(record) if metric else None
    texts = {
        **{key: record[key] for key in ("table", "data", "recipe", "row", "seed")},
        "state": row.states.get(record["seed"], record["status"]),
        "metric": metric.title if metric else None,
        "value": None if value is None else f"{value:.{metric.digits}f}",
        "fingerprint": record["fingerprint"],
        "commit": f"{commit}{' + changes' if record.get('environment.dirty') else ''}" if commit else None,
        **{key: record.get(f"environment.{key}") for key in ("torch", "python", "device", "threads")},
        "started": str(record.get("started") or "")[:16].replace("T", " "),
        "minutes": f"{spent / 60:.1f}" if spent else None,
        "folder": record.get("folder"),
    }
    return {key: "" if value is None else clean(value) for key, value in texts.items()}


def _configurations(records: Sequence[Record]) -> dict[str, Any]:
    """Return what the runs' configurations differ in: the commonest values by key, and of each run those that differ."""
    texts = [{key[7:]: _text(value) for key, value in record.items() if key.startswith("config.")} for record in records]
    keys = sorted({key for configuration in texts for key in configuration})
    counts = {key: Counter(configuration.get(key, "") for configuration in texts) for key in keys}
    common = {key: values.most_common(1)[0][0] for key, values in counts.items() if len(values) > 1}
    runs = [{k: own for k, value in common.items() if (own := c.get(k, "")) != value} for c in texts]
    return {"common": common, "runs": runs}


def _text(value: Any) -> str:
    return "" if value is None else clean(value if isinstance(value, str) else json.dumps(value))


def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False, "sort_keys": False}
    environment.globals |= {"icons": ICONS, "marks": MARKS}
    return environment


def _policy(style: str, scripts: Sequence[str]) -> str:
    """Build the page's content security policy: load nothing, and run only the page's own scripts.

    A text that slipped past Jinja's escaping still could not run. Style attributes colour the rows; a policy cannot allow them
    by hash.
    """
    hashes = {kind: " ".join(map(_hash, texts)) for kind, texts in (("style", [style]), ("script", scripts))}
    return (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; style-src-attr 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


@lru_cache
def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def source(file: str) -> str:
    """Read one of the page's own files, which goes into it unchanged."""
    return (TEMPLATES / file).read_text(encoding="utf-8")


@lru_cache
def _vega() -> str:
    """Return Vega, Vega-Lite and vega-embed as one script. The page's policy blocks the links in it."""
    import vl_convert

    script = vl_convert.javascript_bundle()
    return re.sub(r"</(?=script)", r"<\\/", script, flags=re.IGNORECASE)

"""Render collated tables as one HTML file that opens without a network.

`templates/` has its text, style and script. Jinja escapes everything that comes from records.
"""

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from fpn_ablate.report.collate.claims import ICONS, VERDICTS
from fpn_ablate.report.collate.table import Row, Table, clean
from fpn_ablate.report.formats.grid import VERDICT_HEADER, grid
from fpn_ablate.report.html import charts, gallery
from fpn_ablate.report.html.charts import Chart
from fpn_ablate.report.html.progress import Progress

TEMPLATES = Path(__file__).with_name("templates")
RELOAD = 15  # seconds between reloads while a sweep is running


def render(tables: Sequence[Table], *, progress: Progress | None = None) -> str:
    """Render the page of these tables. With `progress` it shows that first and reloads itself."""
    tables = sorted(tables, key=lambda table: not table.published)  # the paper's tables first
    album = gallery.Album()
    colours = charts.row_colours(tables)
    steps = max(12, min(charts.MAX_STEPS, 400 // max(len(tables), 1)))  # the curves of many tables would take megabytes
    sections = [_section(table, colours[table.name], album, number, steps) for number, table in enumerate(tables, start=1)]
    sheets = gallery.sheets(album)
    has_charts = any(section["charts"] for section in sections)
    scripts = [*([_vega()] if has_charts else []), source("page.js")]
    return _environment().get_template("page.html.j2").render(
        title=_title(tables),
        sections=sections,
        sheets=sheets,
        album=album,
        progress=progress,
        reload=RELOAD,
        newest=max((str(r.get("finished") or "") for t in tables for row in t.rows for r in row.records), default=""),
        runs=sum(len(row.records) for table in tables for row in table.rows),
        style=source("page.css"),
        scripts=scripts,
        verdict_header=VERDICT_HEADER,
    )  # fmt: skip


def _section(table: Table, colours: dict[str, int], album: gallery.Album, number: int, steps: int) -> dict[str, Any]:
    """Build the template's values for one table."""
    content = grid(table)
    charts_or_reasons = charts.charts(table, colours, steps)
    artifacts = gallery.load_artifacts(table, album)
    comparison, pyramid = gallery.gallery(artifacts, album, colours), gallery.pyramid(artifacts, album)
    missing = [item for item in charts_or_reasons if isinstance(item, str)]
    if album.full and not (comparison and pyramid) and artifacts.runs:
        name = table.definition.table
        missing.append(f"Some pictures are left out to keep the page small. A page made with --table {name} has them.")
    return {
        "id": f"t{number}",
        "table": table,
        "content": content,
        "verdicts": list(zip(table.verdicts, content.verdicts, strict=True)),
        "counts": [(word, count) for word in VERDICTS if (count := Counter(v.verdict for v in table.verdicts)[word])],
        "seeds": lambda row: [(s, row.states.get(s, "not run")) for s in sorted({*row.states, *table.definition.seeds})],
        "colours": colours,
        "names": {row.row: row.name for row in table.rows},
        "charts": [item for item in charts_or_reasons if isinstance(item, Chart)],
        "missing": missing,
        "artifacts": artifacts,
        "gallery": comparison,
        "pyramid": pyramid,
        "runs": [_run(row, record) for row in _all_rows(table) for record in row.records],
        "commands": _commands(table),
    }


def _all_rows(table: Table) -> list[Row]:
    return [*table.rows, *([table.control] if table.control else [])]


def _run(row: Row, record: dict[str, Any]) -> dict[str, str]:
    """Return the cells of a run in the table of all runs, by header."""
    commit = record.get("environment.commit")
    seconds = [record.get(f"cost.{key}") for key in ("proposals_s", "train_s", "eval_s")]
    spent = sum(value for value in seconds if type(value) in (int, float))
    texts = {
        "row": record["row"],
        "seed": record["seed"],
        "state": row.states.get(record["seed"], record["status"]),
        "fingerprint": record["fingerprint"],
        "commit": f"{commit}{' + changes' if record.get('environment.dirty') else ''}" if commit else "",
        "torch": record.get("environment.torch"),
        "python": record.get("environment.python"),
        "device": record.get("environment.device"),
        "threads": record.get("environment.threads"),
        "started": str(record.get("started") or "")[:16].replace("T", " "),
        "minutes": f"{spent / 60:.1f}" if spent else None,
        "folder": record.get("folder"),
    }
    return {key: "" if value is None else clean(value) for key, value in texts.items()}


def _commands(table: Table) -> list[tuple[str, int]]:
    """Return the commands that users typed, each with its number of runs."""
    counts = Counter(
        clean(command) for row in _all_rows(table) for r in row.records if (command := r.get("environment.command"))
    )
    return counts.most_common()


def _title(tables: Sequence[Table]) -> str:
    return clean(tables[0].definition.title) if len(tables) == 1 else "Ablations of the feature pyramid"


def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False, "sort_keys": False}
    environment.globals |= {"icons": ICONS}
    return environment


def source(file: str) -> str:
    """Read one of the page's own files, which goes into it unchanged."""
    return (TEMPLATES / file).read_text(encoding="utf-8")


@lru_cache
def _vega() -> str:
    """Return Vega, Vega-Lite and vega-embed as one script. The page's policy blocks the links in it."""
    import vl_convert

    script = vl_convert.javascript_bundle()
    return re.sub(r"</(?=script)", r"<\\/", script, flags=re.IGNORECASE)

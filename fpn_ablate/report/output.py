"""Writing: tables, plots and ledger of a folder of runs, and the tables inside a README."""

import re
from collections.abc import Collection, Iterable
from functools import partial
from pathlib import Path

import pandas as pd

from fpn_ablate.report.collate import records
from fpn_ablate.report.collate.collate import collate
from fpn_ablate.report.collate.table import Key, Table
from fpn_ablate.report.formats import figures, plots, tables
from fpn_ablate.report.html import live
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.files import save_text, write_atomically
from fpn_ablate.utils.paths import EXPERIMENTS

MARKER = re.compile(r"(?P<open><!-- table: (?P<name>\S+) -->\n)(?P<text>.*?)(?P<close><!-- /table -->)", re.DOTALL)
OPENING = re.compile(r"<!-- table: (\S+) -->")
Source = str | Path | Iterable[str | Path] | pd.DataFrame


def write(
    source: Source,
    out: str | Path = "results",
    only: Collection[Key] | None = None,
    experiments: Iterable[Path] = (EXPERIMENTS,),
    settings: Collection[str] | None = None,
) -> list[Table]:
    """Write `<out>/tables`, `<out>/plots`, `<out>/ledger.csv` and `<out>/report.html` from folders of runs, ledgers or a frame.

    `only` limits tables and plots to these (table, recipe, data), and `settings` chooses among their records as in `collate`;
    the ledger takes all records.

    Raises:
        UserError: a path does not exist, a definition is wrong, or records contradict each other; nothing is written.
    """
    frame = source if isinstance(source, pd.DataFrame) else records.load(source)
    collated = collate(frame, only, experiments, settings)
    save(collated, frame, out)
    return collated


def save(collated: Iterable[Table], frame: pd.DataFrame, out: str | Path, runs: Path | None = None) -> None:
    """Write tables that are made, the ledger of the records, and the page; `runs`: where sweeps may be under way."""
    collated = list(collated)
    for table in collated:
        save_table(table, out)
    if len(frame):
        records.write_ledger(frame, Path(out, "ledger.csv"))
    if live.wanted():
        live.save(collated, Path(out), runs, frame.to_dict("records"))


def save_table(table: Table, out: str | Path) -> list[Path]:
    """Write one table in each format, then its plots, and the figures for a paper; returns the files."""
    texts = {f"{table.name}.md": tables.markdown(table), f"{table.name}.csv": tables.csv_text(table)}
    texts[f"{table.name}.tex"] = tables.latex(table)
    if table.verdicts:
        texts[f"{table.name}-claims.csv"] = tables.claims_csv(table)
    for name, text in texts.items():
        save_text(Path(out, "tables", name), text)
    images = {Path("plots", f"{table.name}.{kind}"): image for kind, image in plots.render(table).items()}
    images |= {Path("figures", f"{table.name}-{name}"): image for name, image in figures.render(table).items()}
    for place, image in images.items():
        write_atomically(Path(out, place), partial(Path.write_bytes, data=image))
    return [*(Path(out, "tables", name) for name in texts), *(Path(out, place) for place in images)]


def readme(text: str, collated: Iterable[Table]) -> str:
    """`text` with each block `<!-- table: NAME -->` to `<!-- /table -->` filled with that table.

    NAME is a table's file name without its suffix, or the table alone where there is one of it.

    Raises:
        UserError: a block is not closed, or names no table or several.
    """
    collated = list(collated)
    filled = MARKER.sub(lambda match: match["open"] + _block(match["name"], collated) + match["close"], text)
    openings, blocks = OPENING.findall(text), [match["name"] for match in MARKER.finditer(text)]
    if openings != blocks:
        broken = next((name for name in openings if name not in blocks), openings[-1])
        raise UserError(f"'<!-- table: {broken} -->' must end its line and have a '<!-- /table -->' after it")
    if not blocks:
        raise UserError("no '<!-- table: NAME -->' ... '<!-- /table -->' block to fill")
    return filled


def _block(name: str, collated: list[Table]) -> str:
    found = [table for table in collated if name in (table.name, table.definition.table)]
    found = [table for table in found if table.name == name] or found
    if len(found) != 1:
        names = ", ".join(table.name for table in (found or collated))
        raise UserError(f"'<!-- table: {name} -->' names {len(found) or 'no'} tables; there are: {names}")
    return tables.markdown(found[0])

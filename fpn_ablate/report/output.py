"""Write the tables, plots, ledger and page of a folder of runs, and fill the tables of a README."""

from collections.abc import Collection, Iterable
from functools import partial
from pathlib import Path

import pandas as pd

from fpn_ablate.report.collate import records
from fpn_ablate.report.collate.collate import collate
from fpn_ablate.report.collate.table import Key, Table
from fpn_ablate.report.formats import plots, tables
from fpn_ablate.report.html import figures, live
from fpn_ablate.utils.blocks import fill_blocks
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.files import save_text, write_atomically
from fpn_ablate.utils.paths import EXPERIMENTS

Source = str | Path | Iterable[str | Path] | pd.DataFrame


def write(
    source: Source,
    out: str | Path = "results",
    only: Collection[Key] | None = None,
    experiments: Iterable[Path] = (EXPERIMENTS,),
    settings: Collection[str] | None = None,
) -> list[Table]:
    """Write `<out>/tables`, `<out>/plots`, `<out>/ledger.csv` and `<out>/report.html` from folders of runs, ledgers or a frame.

    `only` limits tables, plots and page to these (table, recipe, data); `settings` selects their records as in `collate`. The
    ledger has all records.

    Raises:
        UserError: a path does not exist, a definition is invalid, or records contradict each other. Nothing is written then.
    """
    frame = source if isinstance(source, pd.DataFrame) else records.load(source)
    collated = collate(frame, only, experiments, settings)
    save(collated, frame, out)
    return collated


def save(collated: Iterable[Table], frame: pd.DataFrame, out: str | Path, runs: Path | None = None) -> None:
    """Write collated tables, the ledger of the records, and the page. `runs`: the folder in which sweeps may be running."""
    collated = list(collated)
    for table in collated:
        save_table(table, out)
    if len(frame):
        records.write_ledger(frame, Path(out, "ledger.csv"))
    if live.is_enabled():
        live.save(collated, Path(out), runs, frame.to_dict("records"))


def save_table(table: Table, out: str | Path) -> list[Path]:
    """Write one table in each format, its plots and the figures for a paper. Return the files."""
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
    """Fill each block `<!-- table: NAME -->` ... `<!-- /table -->` of `text` with that table.

    NAME is a table's file name without its suffix, or only the table if that is unique.

    Raises:
        UserError: there is no block, or a block is not closed, or names no table or several.
    """
    return fill_blocks(text, "table: NAME", partial(_block, collated=list(collated)))


def _block(name: str, collated: list[Table]) -> str:
    matches = [table for table in collated if name in (table.name, table.definition.table)]
    matches = [table for table in matches if table.name == name] or matches
    if len(matches) != 1:
        names = ", ".join(table.name for table in (matches or collated))
        raise UserError(f"'<!-- table: {name} -->' names {len(matches) or 'no'} tables; there are: {names}")
    return tables.markdown(matches[0])

"""Write the tables, plots, ledger and page of a folder of runs, and fill the tables of a README."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import pandas as pd

from fpn_ablate.report.collate import records
from fpn_ablate.report.collate.table import Table
from fpn_ablate.report.formats import plots, tables
from fpn_ablate.report.html import figures, live
from fpn_ablate.utils.blocks import fill_blocks
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.files import refuse_links_out, save_text, write_atomically


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
    texts = {".md": tables.markdown(table), ".csv": tables.csv_text(table), ".tex": tables.latex(table)}
    if table.verdicts:
        texts["-claims.csv"] = tables.claims_csv(table)
    refuse_links_out(out, *(Path(out, name) for name in ("tables", "plots", "figures")))
    written = [Path(out, "tables", f"{table.name}{end}") for end in texts]
    for file, text in zip(written, texts.values(), strict=True):
        save_text(file, text)
    images = {Path(out, "plots", f"{table.name}.{kind}"): image for kind, image in plots.render(table).items()}
    images |= {Path(out, "figures", f"{table.name}-{name}"): image for name, image in figures.render(table).items()}
    for file, image in images.items():
        write_atomically(file, partial(Path.write_bytes, data=image))
    return [*written, *images]


def readme(text: str, collated: Iterable[Table]) -> str:
    """Fill each block `<!-- table: NAME -->` ... `<!-- /table -->` of `text` with that table.

    NAME is a table's file name without its suffix, or only the table if that is unique.

    Raises:
        UserError: there is no block, or a block is not closed, or names no table or several.
    """
    collated = list(collated)

    def block(name: str) -> str:
        matches = [t for t in collated if t.name == name] or [t for t in collated if t.definition.table == name]
        if len(matches) != 1:
            names = ", ".join(table.name for table in (matches or collated))
            raise UserError(f"'<!-- table: {name} -->' names {len(matches) or 'no'} tables; there are: {names}")
        return tables.markdown(matches[0])

    return fill_blocks(text, "table: NAME", block)

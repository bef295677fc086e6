"""Collate finished runs into tables, plots, a page and the ledger: `python -m fpn_ablate report results/runs`."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from fpn_ablate.cli.parser import Parser, command_parser
from fpn_ablate.report import output
from fpn_ablate.report.collate import records
from fpn_ablate.report.collate.collate import collate
from fpn_ablate.report.collate.table import Table
from fpn_ablate.report.formats import terminal
from fpn_ablate.report.html import live
from fpn_ablate.store.plan import writing_tables
from fpn_ablate.utils.console import log_words
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.files import save_text
from fpn_ablate.utils.paths import EXPERIMENTS


def main(arguments: Sequence[str], config_dir: Path | None = None) -> int:
    """Make the tables; 1 if `--check` finds the README out of date, 2 if a table cannot be made.

    Raises:
        UserError: bad arguments, no records, or a README that cannot be filled.
    """
    options = _parser().parse_args(arguments)
    if options.check and options.readme is None:
        raise UserError("--check needs --readme FILE, the file to check")
    added = [config_dir / "experiments"] if config_dir and (config_dir / "experiments").is_dir() else []
    folders = [EXPERIMENTS, *added, *options.experiments]
    if options.watch:
        live.watch(options.source[0], options.out, folders)
        return 0
    # A sweep's end between reading and writing would be lost, so one lock is over both.
    locked = not options.check and (options.out / "runs").is_dir()
    with writing_tables(options.out) if locked else nullcontext():
        chosen, code = _collate(options, folders)
    for table in () if options.check else chosen:  # without the lock, since a pager may hold this up
        terminal.show(table, whole=options.out / "tables" / f"{table.name}.md")
    if not options.check:
        log_words(f"written to {options.out}: {', '.join(table.name for table in chosen) or 'the ledger alone'}", "  ")
    return code


def _collate(options: Namespace, folders: Sequence[Path]) -> tuple[list[Table], int]:
    """Read the records and write all files, or with --check compare the README; return the tables and the exit code."""
    frame = records.load(options.source)
    for item in frame.attrs["unreadable"]:
        print(f"unreadable: {item}", file=sys.stderr)
    if frame.empty:
        looked = ", ".join(map(str, options.source))
        raise UserError(f"no records found in {looked}; a run writes its record.json when it ends")
    errors: list[str] = []
    collated = collate(frame, experiments=folders, errors=errors, allow_unfair=options.allow_unfair)
    chosen = [table for table in collated if not options.table or {table.name, table.definition.table} & {*options.table}]
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    for name in options.table:
        if not any(name in (table.name, table.definition.table) for table in chosen):
            there = ", ".join(table.name for table in collated)
            raise UserError(f"--table {name}: there is none" + (f"; there are {there}" if there else ""))
    # Before anything is written: a README that cannot be filled stops here.
    text = options.readme.read_text(encoding="utf-8") if options.readme else ""
    filled = output.readme(text, collated) if options.readme else ""
    if options.check:
        print(f"{options.readme}: " + ("its tables are up to date" if text == filled else "its tables are out of date"))
        return chosen, 2 if errors else int(text != filled)
    runs = next((source for source in options.source if source.is_dir()), None)
    output.save(chosen, frame, options.out, runs)
    if text != filled:
        save_text(options.readme, filled)
    return chosen, 2 if errors else 0


def _parser() -> Parser:
    parser = command_parser("report", "Collate finished runs into tables, plots, a page and the ledger.")
    parser.add_argument("source", nargs="+", type=Path, help="folders of runs, as results/runs, or a ledger.csv")
    parser.add_argument("--out", type=Path, default=Path("results"), help="where to write (default: results)")
    parser.add_argument("--readme", type=Path, help="fill the '<!-- table: NAME -->' blocks of this file")
    parser.add_argument("--table", action="append", default=[], metavar="NAME", help="only this table (repeatable)")
    parser.add_argument("--watch", action="store_true", help="keep the page up to date while a sweep runs")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if --readme would change")
    parser.add_argument("--experiments", type=Path, action="append", default=[], help="a further folder of table definitions")
    parser.add_argument(
        "--allow-unfair",
        action="store_true",
        help="put rows of several settings into one table, and name in its footer what they differ in",
    )
    return parser

"""`python -m fpn_ablate.report results/runs`: collate finished runs into tables, plots and the ledger."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fpn_ablate.errors import UserError
from fpn_ablate.paths import EXPERIMENTS
from fpn_ablate.report import output, records, tables
from fpn_ablate.report.collate import collate


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when all is well, 1 when --check finds the README out of date, 2 when the input, or that of a table, is wrong."""
    options = _parser().parse_args(arguments)
    try:
        return _report(options)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _report(options: argparse.Namespace) -> int:
    if options.check and options.readme is None:
        raise UserError("--check needs --readme FILE, the file to check")
    frame = records.load(options.source)
    for item in frame.attrs["unreadable"]:
        print(f"unreadable: {item}", file=sys.stderr)
    if frame.empty:
        looked = ", ".join(map(str, options.source))
        raise UserError(f"no records found in {looked}; a run writes its record.json when it ends")
    errors: list[str] = []
    folders = [EXPERIMENTS, *options.experiments]
    collated = collate(frame, experiments=folders, errors=errors, allow_unfair=options.allow_unfair)
    for table in () if options.check else collated:
        tables.show(table)
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    # Before anything is written: a README that cannot be filled stops here.
    text = options.readme.read_text(encoding="utf-8") if options.readme else ""
    filled = output.readme(text, collated) if options.readme else ""
    if options.check:
        print(f"{options.readme}: " + ("its tables are up to date" if text == filled else "its tables are out of date"))
        return 2 if errors else int(text != filled)
    output.save(collated, frame, options.out)
    if text != filled:
        records.save_text(options.readme, filled)
    print(f"written to {options.out}: {', '.join(table.name for table in collated) or 'the ledger alone'}")
    return 2 if errors else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fpn_ablate.report", description=__doc__.split(": ", 1)[1])
    parser.add_argument("source", nargs="+", type=Path, help="folders of runs, as results/runs, or a ledger.csv")
    parser.add_argument("--out", type=Path, default=Path("results"), help="where to write (default: results)")
    parser.add_argument("--readme", type=Path, help="fill the '<!-- table: NAME -->' blocks of this file")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if --readme would change")
    parser.add_argument("--experiments", type=Path, action="append", default=[], help="a further folder of table definitions")
    parser.add_argument(
        "--allow-unfair",
        action="store_true",
        help="put rows of several settings into one table, and name in its footer what they differ in",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())

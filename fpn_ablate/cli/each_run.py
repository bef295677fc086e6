"""Apply a function to each finished run below some folders; `measure` and `artifacts` share it."""

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fpn_ablate.cli.parser import command_parser
from fpn_ablate.store.record import read
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.files import UNREADABLE, safe_name
from fpn_ablate.utils.paths import RECORD


def update_runs(arguments: Sequence[str], command: str, about: str, update: Callable[[Path], str]) -> int:
    """Call `update(folder)` for each run and print the line that it returns; 2 if a run could not be updated.

    Args:
        update: raises UserError, or what reading a damaged file raises, where a run is to be left as it is.
    """
    parser = command_parser(command, about)
    parser.add_argument("runs", nargs="+", type=Path, help="a folder of runs, as results/runs, or of one run")
    options = parser.parse_args(arguments)
    # Folders may lie within one another, and be spelt in two ways.
    files = sorted({file.resolve(): file for folder in options.runs for file in folder.rglob(RECORD)}.values())
    if not files:
        raise UserError(f"no {RECORD} below {', '.join(map(str, options.runs))}; give results/runs, or a run's folder")
    failures = 0
    for folder in (file.parent for file in files):
        try:
            print(update(folder))
        except (UserError, *UNREADABLE) as error:
            reason = str(error).removeprefix(f"{folder}: ")
            print(f"left as it was: {folder}: {reason}", file=sys.stderr)
            failures += 1
    if failures < len(files):
        print(f"to make the tables again: python -m fpn_ablate report {shlex.join(dict.fromkeys(map(_all_runs, files)))}")
    return 2 if failures else 0


def _all_runs(file: Path) -> str:
    """Return the folder that holds all runs, of which a table needs every row; for a run that was moved its own folder."""
    folder, content = file.parent.resolve(), read(file.parent) or {}
    names = [safe_name(str(content.get(key))) for key in ("table", "recipe", "row")]
    runs = folder.parents[3] if len(folder.parents) > 3 and list(folder.parts[-4:-1]) == names else folder
    return str(runs.relative_to(Path.cwd()) if runs.is_relative_to(Path.cwd()) else runs)

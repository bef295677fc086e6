"""List what can be removed, how much that is, and remove it once that is confirmed: `python -m fpn_ablate clean`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from fpn_ablate.cli.parser import command_parser
from fpn_ablate.store.leftovers import DAY, KINDS, RECENT, Item, find, remove_empty_parents
from fpn_ablate.utils.errors import UserError

ABOUT = """List what can be removed below a folder of results and in the user's cache, and remove it once you confirm:
leftovers of killed processes, checkpoints that a finished run no longer needs, unfinished runs and caches that nobody has
touched for some days. Finished runs are removed only with --finished, and no run that a process works on."""
TITLES = {
    "leftovers": "leftovers of killed processes, and checkpoints of finished runs",
    "unfinished": "runs that failed, diverged or were interrupted",
    "cache": "pictures in the user's cache",
    "finished": "FINISHED RUNS",
}


def main(arguments: Sequence[str], config_dir: Path | None = None) -> int:
    """List and remove; 1 if it was not confirmed, 2 if something could not be removed.

    Raises:
        UserError: there is no such folder.
    """
    parser = command_parser("clean", ABOUT)
    parser.add_argument("out", nargs="?", type=Path, default=Path("results"), help="folder of results (default: results)")
    parser.add_argument("--older", type=float, default=7, metavar="DAYS", help="untouched for so long (default: %(default)s)")
    parser.add_argument("--only", choices=KINDS, action="append", metavar="KIND", help=f"{', '.join(KINDS)} (repeatable)")
    parser.add_argument("--finished", action="store_true", help="finished runs as well")
    parser.add_argument("--dry-run", action="store_true", help="list only")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    options = parser.parse_args(arguments)
    if options.older < 0:
        parser.error(f"--older {options.older:g}: give a number of days from 0 on")
    if not options.out.is_dir():
        raise UserError(f"{options.out}: no such folder; give the one that holds runs/")
    kinds = set(options.only or KINDS) - (set() if options.finished else {"finished"})
    items = [item for item in find(options.out, options.older) if item.kind in kinds]
    _list(items, options.older)
    if not items or options.dry_run:
        return 0
    if not options.yes and not _confirmed(len(items)):
        print("nothing removed")
        return 1
    return _remove(items, options.out)


def _list(items: Sequence[Item], older: float) -> None:
    for kind in KINDS:
        chosen = [item for item in items if item.kind == kind]
        if chosen:
            print(f"{TITLES[kind]}: {len(chosen)}, {_bytes(sum(item.size for item in chosen))}")
        for item in chosen:
            print(f"  {item.path}\n    {item.reason} for {item.days:.0f} days, {_bytes(item.size)}")
    total = f"in all: {_bytes(sum(item.size for item in items))}"
    none = f"nothing to remove that has been untouched for {older:g} days (--older DAYS)"
    none += f"; what was used within {RECENT / 60:.0f} minutes stays" if older * DAY < RECENT else ""
    print(total if items else none)


def _confirmed(count: int) -> bool:
    if not sys.stdin.isatty():
        print("--yes removes them")
        return False
    try:
        return input(f"remove {count} item{'s' * (count > 1)}? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:  # Ctrl-D
        print()
        return False


def _remove(items: Sequence[Item], out: Path) -> int:
    failures, size = 0, 0
    for item in items:
        try:
            item.remove()
            size += item.size
            remove_empty_parents(item.path, out)
        except OSError as error:
            reason = "a process works on it" if isinstance(error, TimeoutError) else error.strerror
            print(f"{item.path}: not removed ({reason})", file=sys.stderr)
            failures += 1
    print(f"removed {len(items) - failures} items, {_bytes(size)}")
    return 2 if failures else 0


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.3g} {unit}" if unit != "B" else f"{size:.0f} B"
        size /= 1000
    raise AssertionError

"""The page while a sweep is under way: a process of its own, of the lowest priority, which writes it again as runs go on.

A sweep starts it and knows nothing more of it, so that it cannot slow or harm a training; it ends by itself when the sweep
has. `FPN_ABLATE_PAGE=off` in the environment leaves it, and the page at a sweep's end, out.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import Timeout

from fpn_ablate.report.collate import records
from fpn_ablate.report.collate.collate import collate
from fpn_ablate.report.collate.table import Table
from fpn_ablate.report.html.progress import progress
from fpn_ablate.store import plan
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.files import save_text
from fpn_ablate.utils.locks import lock
from fpn_ablate.utils.paths import EXPERIMENTS

NAME, SWITCH = "report.html", "FPN_ABLATE_PAGE"
PAUSE, SHARE = 10.0, 4  # seconds between two pages, at least; and at least so many times what the last one took
LONGEST = 300.0  # seconds to wait for another process that writes the page
LOOK = 1.0  # seconds between two looks whether the sweep has ended, or a run has


def wanted() -> bool:
    return os.environ.get(SWITCH, "") != "off"


def start(out: Path, experiments: Iterable[Path] = ()) -> None:
    """Begin to watch the sweeps below `out`, in a process that outlives this one."""
    folders = [argument for folder in experiments for argument in ("--experiments", str(folder.resolve()))]
    command = [sys.executable, "-m", "fpn_ablate", "report", str(out / "runs"), "--out", str(out), "--watch", *folders]
    none = subprocess.DEVNULL
    subprocess.Popen(command, stdin=none, stdout=none, stderr=none, start_new_session=True)


def watch(runs: Path, out: Path, experiments: Iterable[Path] = (EXPERIMENTS,)) -> None:
    """Write the page again and again while a sweep is under way; one process at a time, a second one leaves at once."""
    os.nice(19)
    experiments = list(experiments)
    with suppress(Timeout):
        while plan.active_plans(
            runs, this_host=True
        ):  # asked again without the lock: a sweep may begin while the last page is written
            with lock(_locks(runs) / "watch", timeout=0):
                _watch(runs, out, experiments)


def _watch(runs: Path, out: Path, experiments: list[Path]) -> None:
    while plan.active_plans(runs, this_host=True):
        begun, seen = time.monotonic(), _ended(runs)
        with suppress(UserError, OSError):  # a table's file that is being edited, a full disk
            write(runs, out, experiments, under_way=True)
        took = time.monotonic() - begun
        soon, due = (time.monotonic() + seconds for seconds in (max(LOOK, took), max(PAUSE, SHARE * took)))
        while (
            plan.active_plans(runs, this_host=True) and time.monotonic() < due and (time.monotonic() < soon or _ended(runs) == seen)
        ):
            time.sleep(LOOK)
    if plan.has_leftover_plan(runs):
        write(runs, out, experiments)  # the sweep was killed, and wrote no last page


def write(
    runs: Path, out: Path, experiments: Iterable[Path] = (EXPERIMENTS,), first: Iterable[Table] = (), under_way: bool = False
) -> Path | None:
    """Write `<out>/report.html` from all that is there now; None where there is nothing to show.

    Args:
        first: tables that are made, which stand in the place of those of the same key.
        under_way: only if a sweep is.
    """
    with lock(_locks(runs) / "page", timeout=LONGEST):
        if under_way and not plan.active_plans(runs):
            return None  # its end has written the page
        frame, first = records.load(runs), list(first)
        found = frame.to_dict("records")
        others = {(r["table"], r["recipe"], r["data"]) for r in found} - {table.key for table in first}
        return save([*first, *collate(frame, others, experiments, errors=[])], out, runs, found)


def save(tables: list[Table], out: Path, runs: Path | None = None, found: Iterable[dict[str, Any]] = ()) -> Path | None:
    """Write the page of these tables, with the progress of the sweeps below `runs`, whose records are `found`."""
    from fpn_ablate.report.html import page

    under_way = progress(plan.active_plans(runs), runs, found, tables) if runs else None
    if not tables and under_way is None:
        return None
    text = page.render(tables, progress=under_way)
    save_text(out / NAME, text)
    return out / NAME


def _locks(runs: Path) -> Path:
    folder = runs / plan.FOLDER / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _ended(runs: Path) -> int:
    """The newest record's time, in nanoseconds: cheap to ask, and changes when a run begins or ends."""
    return max((file.stat().st_mtime_ns for file in runs.glob("*/*/*/*/record.json")), default=0)

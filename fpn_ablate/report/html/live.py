"""Keep the page up to date while a sweep runs, in a separate process of the lowest priority.

A sweep starts the process and does not wait for it, so it cannot slow or break a training. It exits after the sweep has ended.
`FPN_ABLATE_PAGE=off` in the environment disables it, and the page at the sweep's end.
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
# Seconds between two pages: at least PAUSE, and at least SHARE times as long as the last page took.
PAUSE, SHARE = 10.0, 4
LOCK_TIMEOUT = 300.0  # seconds to wait for another process that writes the page
POLL = 1.0  # seconds between two checks whether the sweep has ended


def is_enabled() -> bool:
    return os.environ.get(SWITCH, "") != "off"


def start(out: Path, experiments: Iterable[Path] = ()) -> None:
    """Start `watch` on the sweeps below `out` in a process that outlives this one."""
    folders = [argument for folder in experiments for argument in ("--experiments", str(folder.resolve()))]
    command = [sys.executable, "-m", "fpn_ablate", "report", str(out / "runs"), "--out", str(out), "--watch", *folders]
    none = subprocess.DEVNULL
    subprocess.Popen(command, stdin=none, stdout=none, stderr=none, start_new_session=True)


def watch(runs: Path, out: Path, experiments: Iterable[Path] = (EXPERIMENTS,)) -> None:
    """Rewrite the page while a sweep is running. If another process does so already, return at once."""
    os.nice(19)
    experiments = list(experiments)

    def is_running() -> bool:
        return bool(plan.active_plans(runs, this_host=True))

    with suppress(Timeout), lock(_locks(runs) / "watch", timeout=0):
        while is_running():
            begun = time.monotonic()
            with suppress(UserError, OSError):  # a definition that is being edited, a full disk
                write(runs, out, experiments, only_if_running=True)
            due = time.monotonic() + max(PAUSE, SHARE * (time.monotonic() - begun))
            while is_running() and time.monotonic() < due:
                time.sleep(POLL)
        if plan.has_leftover_plan(runs):
            write(runs, out, experiments)  # the sweep was killed and wrote no last page


def write(
    runs: Path,
    out: Path,
    experiments: Iterable[Path] = (EXPERIMENTS,),
    tables: Iterable[Table] = (),
    only_if_running: bool = False,
) -> Path | None:
    """Write `<out>/report.html` from all records below `runs`; None if there is nothing to show.

    Args:
        tables: tables already collated, which replace those of the same key.
        only_if_running: write only while a sweep is running.
    """
    with lock(_locks(runs) / "page", timeout=LOCK_TIMEOUT):
        if only_if_running and not plan.active_plans(runs):
            return None  # the sweep has ended and has written the page
        frame, tables = records.load(runs), list(tables)
        flat = frame.to_dict("records")
        others = {(r["table"], r["recipe"], r["data"]) for r in flat} - {table.key for table in tables}
        return save([*tables, *collate(frame, others, experiments, errors=[])], out, runs, flat)


def save(tables: list[Table], out: Path, runs: Path | None = None, flat: Iterable[dict[str, Any]] = ()) -> Path | None:
    """Write the page of these tables, with the progress of the sweeps below `runs`, whose flat records are `flat`."""
    from fpn_ablate.report.html import page

    sweeps = progress(plan.active_plans(runs), runs, flat, tables) if runs else None
    if not tables and sweeps is None:
        return None
    save_text(out / NAME, page.render(tables, progress=sweeps))
    return out / NAME


def _locks(runs: Path) -> Path:
    folder = runs / plan.PLANS / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder

"""Measure the latency of finished runs again, one run at a time: `python -m fpn_ablate measure results/runs`."""

from collections.abc import Sequence
from pathlib import Path

from fpn_ablate.cli.each_run import update_runs

ABOUT = """Measure the latency of finished runs again, one after the other: in a sweep, other work on the machine spoils it. The
new figures go into the runs' records."""


def main(arguments: Sequence[str], config_dir: Path | None = None) -> int:
    """Measure each run below the given folders; 2 if one cannot be measured here."""
    measured = {}

    def update(folder: Path) -> str:
        from fpn_ablate.runs.remake import measure_again  # loads torch, which takes seconds

        return measure_again(folder, measured, config_dir)

    return update_runs(arguments, "measure", ABOUT, update)

"""Measure the latency of finished runs again, one run at a time: `python -m fpn_ablate measure results/runs`."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from fpn_ablate.cli.each_run import update_runs
from fpn_ablate.runs.remake import measure_again

ABOUT = """Measure the latency of finished runs again, one after the other: in a sweep, other work on the machine spoils it. The
new figures go into the runs' records."""


def main(arguments: Sequence[str], config_dir: Path | None = None) -> int:
    """Measure each run below the given folders; 2 if one cannot be measured here."""
    return update_runs(arguments, "measure", ABOUT, partial(measure_again, measured={}, config_dir=config_dir))

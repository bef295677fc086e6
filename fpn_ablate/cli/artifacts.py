"""Make again what the page shows of finished runs beside their figures: `python -m fpn_ablate artifacts results/runs`."""

from collections.abc import Sequence
from pathlib import Path

from fpn_ablate.cli.each_run import update_runs

ABOUT = """Make intervals, recall by size, kinds of errors, thumbnails and activation maps of finished runs again, from their
saved detections.
It works on any machine; activation maps take the device that the run was made on, and stay as they are elsewhere."""


def main(arguments: Sequence[str], config_dir: Path | None = None) -> int:
    """Make the artifacts of each run below the given folders; 2 if a run cannot be read."""

    def update(folder: Path) -> str:
        from fpn_ablate.runs.remake import remake_artifacts  # loads torch, which takes seconds

        return remake_artifacts(folder, config_dir=config_dir)

    return update_runs(arguments, "artifacts", ABOUT, update)

#!/usr/bin/env python
"""Keep the runs by which a recipe was chosen, and show them as a table and as learning curves.

    python scripts/recipe_trials.py [RUNS ...] [--csv FILE] [--plot FILE] [--readme FILE]

Adds the finished runs below the folders RUNS to FILE, one line a run. The table has a line for each way to train: the mean of
each row's AR@100 / AR@1k, with the standard deviation over seeds behind it. The plot shows the objectness loss of these runs.
"""

import argparse
import json
import math
import statistics
import sys
import textwrap
from pathlib import Path
from typing import Any

import pandas as pd

from fpn_ablate.store import record
from fpn_ablate.utils.blocks import fill_blocks
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.files import save_text, write_atomically
from fpn_ablate.utils.paths import METRICS as METRICS_FILE
from fpn_ablate.utils.paths import RECORD

REFERENCE = Path(__file__).parents[1] / "results" / "reference"
ROWS = ("c4", "c5", "fpn", "bottom_up", "no_lateral", "finest")
METRICS = ("AR100", "AR1k", "AR1k_s", "AR1k_m", "AR1k_l")
KEYS = ["data", "recipe", "steps"]  # runs that differ in the seed alone
POINTS = 15  # of a learning curve
BLOCK = "trials"  # of a document


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        trials = _read(options.csv)
        if missing := [str(folder) for folder in options.runs if not folder.is_dir()]:
            raise UserError(f"{', '.join(missing)}: no such folder")
        found = [line for folder in options.runs for line in map(_line, sorted(folder.rglob(RECORD))) if line]
        trials = pd.concat([trials, pd.DataFrame(found)])
        if trials.empty:
            raise UserError(f"no finished runs of Table 1's rows in {' '.join(map(str, options.runs)) or options.csv}")
        trials = trials.drop_duplicates("fingerprint", keep="last").astype({"seed": int, "steps": int, "threads": int})
        trials = trials.sort_values(["data", "recipe", "row", "seed"], kind="stable")
        save_text(options.csv, trials.to_csv(index=False))
        text = table(trials)
        if options.readme:
            save_text(options.readme, fill_blocks(options.readme.read_text(encoding="utf-8"), BLOCK, lambda _: text))
        write_atomically(options.plot, lambda path: _plot(trials, path))
    except (OSError, UserError) as error:
        print(error, file=sys.stderr)
        return 2
    print(text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUNS", help="folders of runs to add")
    parser.add_argument("--csv", type=Path, default=REFERENCE / "trials.csv", help="default: %(default)s")
    parser.add_argument("--plot", type=Path, default=REFERENCE / "trials.png", help="default: %(default)s")
    parser.add_argument("--readme", type=Path, help=f"document whose '<!-- {BLOCK} -->' block becomes the table")
    return parser


def _read(path: Path) -> pd.DataFrame:
    if not path.exists():
        return pd.DataFrame(columns=["fingerprint"])
    try:
        return pd.read_csv(path, dtype={"fingerprint": str, "commit": str})
    except ValueError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def _line(path: Path) -> dict[str, Any] | None:
    """Return what is kept of a finished run of a row of Table 1; None for any other."""
    run = record.read(path.parent)
    if not run or run["status"] != "finished" or run["row"] not in ROWS or run["task"] != "rpn":
        return None
    file = path.parent / METRICS_FILE
    try:
        curve = [step["rpn_objectness"] for step in map(json.loads, file.open()) if "rpn_objectness" in step]
    except ValueError as error:
        raise UserError(f"{file}: cannot be read ({error})") from None
    return {
        "fingerprint": run["fingerprint"],
        "data": run["data"],
        "recipe": run["recipe"],
        "row": run["row"],
        "seed": run["seed"],
        "steps": run["config"]["recipe"]["steps"],
        **{metric: None if (share := run["metrics"][metric]) is None else round(100 * share, 2) for metric in METRICS},
        "objectness": " ".join(f"{loss:.4f}" for loss in _thin(curve)),
        "device": run["environment"]["device"],
        "threads": run["environment"]["threads"],
        "commit": run["environment"]["commit"],
    }


def _thin(curve: list[float]) -> list[float]:
    """Average equal stretches of a curve, in POINTS points at most."""
    size = math.ceil(len(curve) / POINTS)
    return [statistics.fmean(curve[start : start + size]) for start in range(0, len(curve), size)]


def table(trials: pd.DataFrame) -> str:
    """Return the Markdown table: a line for each way to train, a column for each row."""
    lines = [" | ".join(("| data | recipe | steps", *ROWS)) + " |", "| --- | --- |" + " ---: |" * (1 + len(ROWS))]
    for (data, recipe, steps), runs in trials.groupby(KEYS):
        cells = [_cell(runs[runs.row == row]) for row in ROWS]
        lines.append(" | ".join((f"| {data} | {recipe} | {steps}", *cells)) + " |")
    return "\n".join(lines) + "\n"


def _cell(runs: pd.DataFrame) -> str:
    if runs.empty:
        return ""
    means = " / ".join(f"{runs[metric].mean():.1f}" for metric in ("AR100", "AR1k"))
    if len(runs) == 1:
        return means
    spread = " / ".join(f"{runs[metric].std():.1f}" for metric in ("AR100", "AR1k"))
    return f"{means} (sd {spread}, n {len(runs)})"


def _plot(trials: pd.DataFrame, path: Path) -> None:
    """Plot each run's objectness loss over its steps, a panel for each way to train."""
    from matplotlib.figure import Figure

    groups = list(trials.groupby(KEYS))
    columns = min(3, len(groups))
    figure = Figure(figsize=(4 * columns, 3 * math.ceil(len(groups) / columns)), layout="constrained")
    for number, ((data, recipe, _), runs) in enumerate(groups, start=1):
        axes = figure.add_subplot(math.ceil(len(groups) / columns), columns, number)
        for run in runs.itertuples():
            losses = [float(loss) for loss in str(run.objectness).split()]
            steps = [run.steps * (point + 1) / len(losses) for point in range(len(losses))]
            axes.plot(steps, losses, color=f"C{ROWS.index(run.row)}", linewidth=1, label=run.row)
        handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        axes.legend(handles.values(), handles.keys(), fontsize=7)
        axes.set_title(textwrap.fill(f"{data}: {recipe}".replace("+", " +"), 56), fontsize=7)
        axes.set(yscale="log", xlabel="step", ylabel="objectness loss")
    figure.savefig(path, dpi=100, format="png")


if __name__ == "__main__":
    sys.exit(main())

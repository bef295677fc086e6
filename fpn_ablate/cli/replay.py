"""Copy finished runs to Weights & Biases: `python -m fpn_ablate replay results/runs`."""

from collections.abc import Sequence
from pathlib import Path

from fpn_ablate.cli.parser import command_parser
from fpn_ablate.tracking.replay import replay
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.paths import RECORD


def main(arguments: Sequence[str], config_dir: Path | None = None) -> int:
    """Copy the runs below the given folders, each once; 2 if one could not be copied."""
    parser = command_parser("replay", "Copy finished runs to Weights & Biases, each once.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or one of runs, as results/runs")
    parser.add_argument("--online", action="store_true", help="send them; without it, write offline copies for wandb sync")
    parser.add_argument("--again", action="store_true", help="also those that have been copied, under the same ids")
    options = parser.parse_args(arguments)
    folders = sorted({file.parent for runs in options.runs for file in runs.rglob(RECORD)})
    if not folders:
        raise UserError(f"no {RECORD} below {', '.join(map(str, options.runs))}; give results/runs, or a run's folder")
    failures = 0
    for folder in folders:
        line, copied = replay(folder, "online" if options.online else "offline", options.again)
        print(f"{folder}: {line}", flush=True)
        failures += not copied
    return 2 if failures else 0

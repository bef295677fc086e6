"""Draw what finished runs detect, side by side: `python -m fpn_ablate pictures RUN RUN`."""

from collections.abc import Sequence
from pathlib import Path

from fpn_ablate.cli.parser import command_parser
from fpn_ablate.evaluation.display import MIN_SCORE
from fpn_ablate.utils.files import write_atomically

ABOUT = "Draw what finished runs detect, one line per image: the ground truth, then one column per run."


def main(arguments: Sequence[str], config_dir: Path | None = None) -> int:
    """Write the picture.

    Raises:
        UserError: a run is not finished or not readable, or the runs are on different data.
    """
    parser = command_parser("pictures", ABOUT)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--count", type=int, default=4, help="images, spread over those evaluated (default 4)")
    parser.add_argument("--threshold", type=float, default=MIN_SCORE, help="lowest score of a detection (default %(default)s)")
    parser.add_argument("--root", help="the data set's folder, if it has moved")
    parser.add_argument("--out", type=Path, default=Path("pictures.png"), help=".png, .pdf or .svg (default pictures.png)")
    options = parser.parse_args(arguments)
    kind = options.out.suffix[1:].lower()
    if options.count < 1 or not 0 <= options.threshold <= 1 or kind not in ("png", "pdf", "svg"):
        parser.error("--count is at least 1, --threshold from 0 to 1, and --out ends in .png, .pdf or .svg")

    import matplotlib

    from fpn_ablate.report.formats.plots import STYLE
    from fpn_ablate.runs.draw import FinishedRun, draw  # loads torch, which takes seconds

    with matplotlib.rc_context(STYLE):
        runs = [FinishedRun.load(folder, options.root, config_dir) for folder in options.runs]
        sheet = draw(runs, options.count, options.threshold)
        write_atomically(options.out, lambda path: sheet.savefig(path, format=kind, dpi=200, facecolor="white"))
    print(f"written to {options.out}")
    return 0

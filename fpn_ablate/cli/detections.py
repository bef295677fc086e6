"""Write what a finished run detects in COCO's result format: `python -m fpn_ablate detections RUN --out FILE`."""

import json
from collections.abc import Sequence
from pathlib import Path

from fpn_ablate.cli.parser import command_parser
from fpn_ablate.utils.files import save_text

ABOUT = """Write the boxes or the masks of a finished run, also of mode=evaluate, in COCO's result format, with the ids of
images and categories of the data set. Proposals, which have no category, get category 1."""
MASKS = (
    "masks in place of boxes; they need a file of their own, since beside a box COCO's API takes the box's area for the mask's"
)


def main(arguments: Sequence[str], config_dir: Path | None = None) -> int:
    """Write the file.

    Raises:
        UserError: the run is not finished or not readable, has no masks, or its data have changed.
    """
    parser = command_parser("detections", ABOUT)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--masks", action="store_true", help=MASKS)
    parser.add_argument("--root", help="the data set's folder, if it has moved")
    parser.add_argument("--out", type=Path, default=Path("detections.json"), help="(default %(default)s)")
    options = parser.parse_args(arguments)

    from fpn_ablate.runs.draw import FinishedRun  # loads torch, which takes seconds
    from fpn_ablate.runs.results import coco_results

    results = coco_results(FinishedRun.load(options.run, options.root, config_dir), options.masks)
    save_text(options.out, json.dumps(results))
    print(f"{len(results)} {'masks' if options.masks else 'boxes'} written to {options.out}")
    return 0

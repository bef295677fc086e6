"""Examine a data set before a sweep: `python -m fpn_ablate doctor data=coco data.root=PATH`, or `doctor ANNOTATIONS
[IMAGES]`."""

import argparse
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from fpn_ablate.cli.doctor_text import show
from fpn_ablate.cli.parser import Parser, command_parser
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.files import save_text

ABOUT = """Examine both splits of a data set as a run with these key=value would see them; or one annotation file, with its
images where their folder is given. Exit code 0: sound, 1: a training would be refused, 2: bad arguments."""
OVERRIDE = re.compile(r"[+~]*[a-z][\w./@]*=|~[a-z]")  # key=value or ~key, as for a run


def main(arguments: Sequence[str], config_dir: Path | None = None) -> int:
    """Print what is wrong with a data set, and how well each row's anchors cover its objects.

    Raises:
        UserError: bad arguments, no folder `data.root`, or weights that do not fit.
    """
    parser = command_parser("doctor", ABOUT)
    parser.add_argument("what", nargs="*", metavar="key=value | FILE", help="as for a run; or ANNOTATIONS [IMAGES]")
    parser.add_argument("--json", metavar="FILE", help="write the facts as JSON; - prints them instead of the text")
    parser.add_argument("--limit", type=int, default=50, help="findings to print of each split (default 50; 0: all)")
    parser.add_argument("--links", action="store_true", help="of FILE: follow links out of the folder of images")
    parser.add_argument("--masks", action="store_true", help="of FILE: check the masks too, as for a task that needs them")
    options = parser.parse_intermixed_args(arguments)
    if options.json is not None and not Path(options.json).name:
        raise UserError(f"--json {options.json!r}: give the name of a file, or - for standard output")
    if options.what and not any(OVERRIDE.match(word) and not os.path.exists(word) for word in options.what):
        return _examine_file(options, parser)
    return _examine_splits(options, config_dir)


def _examine_splits(options: argparse.Namespace, config_dir: Path | None) -> int:
    from fpn_ablate.config.rows import compose_rows
    from fpn_ablate.doctor.report import describe_data
    from fpn_ablate.sweep.checks import check_parts, check_weights

    rows = {cfg.row: cfg for cfg in compose_rows(options.what, config_dir)}
    for cfg in rows.values():
        check_parts(cfg)
    check_weights([cfg for cfg in rows.values() if cfg.backbone.weights != "imagenet"])  # doctor downloads nothing
    if options.links:
        raise UserError("--links goes with a FILE; with key=value set data.links=true")
    if options.masks:
        raise UserError("--masks goes with a FILE; with key=value the task decides")
    report = describe_data(rows)
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    if options.json == "-":
        print(text, end="")
    else:
        show(report, options.limit)
        if options.json:
            save_text(Path(options.json), text)
    return 0 if report["sound"] else 1


def _examine_file(options: argparse.Namespace, parser: Parser) -> int:
    from fpn_ablate.data.checks.examine import examine, summary
    from fpn_ablate.data.checks.findings import BOX, BROKEN, NOTE

    if len(options.what) > 2:
        parser.error(f"{options.what[2]}: an annotation file and a folder of images at most, or key=value")
    if options.json is not None:
        parser.error("--json goes with key=value, as data=coco data.root=PATH")
    annotations, images = Path(options.what[0]), Path(options.what[1]) if len(options.what) == 2 else None
    if annotations.is_dir():
        parser.error(f"{annotations} is a folder: data=coco data.root={annotations} looks over the set in it")
    report = examine(annotations, images, options.links, options.masks)
    if report.annotations is not None:
        table = report.annotations
        print(f"{len(table.image_ids)} images, {len(table.ids)} objects, {len(table.categories)} categories")
    for title, findings in (("Problems", report.at(BROKEN, BOX)), ("Notes", report.at(NOTE))):
        if findings:
            print(f"{title}: {summary(findings, options.limit or len(findings))}")
    print("Sound." if report.sound else "A training would be refused.")
    return 0 if report.sound else 1

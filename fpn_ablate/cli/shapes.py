"""Write the generated data set as files: `python -m fpn_ablate shapes --export DIR` or `--sheet FILE`."""

from collections.abc import Sequence
from pathlib import Path

from fpn_ablate.cli.parser import at_least, command_parser


def main(arguments: Sequence[str], config_dir: Path | None = None) -> int:
    """Export the set, or write a sample sheet.

    Raises:
        UserError: the disk does not take it.
    """
    parser = command_parser("shapes", "Write the generated data set as COCO-format files, or a sheet of examples.")
    parser.add_argument("--export", type=Path, metavar="DIR", help="write COCO JSON and PNG to this folder")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="write examples with their boxes to this picture")
    parser.add_argument("--train", type=at_least(1), default=800, help="training pictures (default %(default)s)")
    parser.add_argument("--val", type=at_least(1), default=200, help="validation pictures (default %(default)s)")
    parser.add_argument("--size", type=at_least(1), default=256, help="height and width in pixels (default %(default)s)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of the world (default %(default)s)")
    options = parser.parse_args(arguments)
    if not (options.export or options.sheet):
        parser.error("give --export DIR, --sheet FILE or both")

    from fpn_ablate.data.shapes.export import contact_sheet, export  # loads torch, which takes seconds
    from fpn_ablate.data.shapes.world import World

    world = World(height=options.size, width=options.size, seed=options.seed)
    if options.export:
        export(world, {"train": options.train, "val": options.val}, options.export)
        print(f"wrote {options.train} + {options.val} pictures; train on them with: data=coco data.root={options.export}")
    if options.sheet:
        contact_sheet(world, options.sheet)
        print(f"wrote {options.sheet}")
    return 0

"""`python -m fpn_ablate.data.shapes --export DIR` or `--sheet FILE`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fpn_ablate.data.shapes.export import contact_sheet, export
from fpn_ablate.data.shapes.world import World
from fpn_ablate.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """0 when all is written, 2 when the disk does not take it."""
    parser = argparse.ArgumentParser(prog="python -m fpn_ablate.data.shapes", description="The generated data set as files.")
    parser.add_argument("--export", type=Path, metavar="DIR", help="write COCO JSON and PNG to this folder")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="write examples with their boxes to this picture")
    parser.add_argument("--train", type=int, default=800, help="training pictures (default %(default)s)")
    parser.add_argument("--val", type=int, default=200, help="validation pictures (default %(default)s)")
    parser.add_argument("--size", type=int, default=256, help="height and width in pixels (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the world (default %(default)s)")
    args = parser.parse_args(argv)
    if not (args.export or args.sheet):
        parser.error("give --export DIR, --sheet FILE or both")
    try:
        _write(args, World(height=args.size, width=args.size, seed=args.seed))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _write(args: argparse.Namespace, world: World) -> None:
    if args.export:
        export(world, {"train": args.train, "val": args.val}, args.export)
        print(f"wrote {args.train} + {args.val} pictures; train on them with: data=coco data.root={args.export}")
    if args.sheet:
        contact_sheet(world, args.sheet)
        print(f"wrote {args.sheet}")


if __name__ == "__main__":
    sys.exit(main())

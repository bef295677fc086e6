"""`python -m fpn_ablate.data.shapes --export DIR` or `--sheet FILE`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from fpn_ablate.data.shapes.export import contact_sheet, export
from fpn_ablate.data.shapes.world import World


def main(argv: Sequence[str] | None = None) -> None:
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
    world = World(height=args.size, width=args.size, seed=args.seed)
    if args.export:
        export(world, {"train": args.train, "val": args.val}, args.export)
        print(f"wrote {args.train} + {args.val} pictures; train on them with: data=coco data.root={args.export}")
    if args.sheet:
        contact_sheet(world, args.sheet)
        print(f"wrote {args.sheet}")


if __name__ == "__main__":
    main()

"""Import weights of torchvision and detectron2, and export ours: `python -m fpn_ablate weights import|export`."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fpn_ablate.cli.parser import Parser, command_parser
from fpn_ablate.utils.errors import UserError

if TYPE_CHECKING:
    from fpn_ablate.weights.convert import Weights


def main(arguments: Sequence[str], config_dir: Path | None = None) -> int:
    """Write the file.

    Raises:
        UserError: the file cannot be read, the other program has no such network, or the place is wrong.
    """
    options = _parser().parse_args(arguments)

    from fpn_ablate.weights.convert import BN_EPS, SUFFIX, Options, to_torchvision  # loads torch, which takes seconds
    from fpn_ablate.weights.files import locate, write_safetensors, write_torch
    from fpn_ablate.weights.loading import open_weights

    to_torch = options.command == "export" and options.to == "torchvision"
    _refuse_place(locate(options.file), options.out, None if to_torch else SUFFIX)
    unstated = None
    if options.command == "import":
        eps = BN_EPS if options.bn_eps is None else options.bn_eps
        unstated = Options(eps, options.pixel_std, options.rgb or None, options.keep_classes)
    weights = open_weights(options.file, unstated)
    if to_torch:
        write_torch(options.out, to_torchvision(weights))
    else:
        write_safetensors(options.out, weights.tensors, weights.facts)
    _print_facts(weights)
    if to_torch:
        _print_use_in_torchvision(weights)
    print(f"written: {options.out}")
    return 0


def _print_facts(weights: "Weights") -> None:
    facts = weights.facts
    row, classes = f"row {facts.get('row')}", f"{facts.get('num_classes')} classes"
    parts = [weights.source, facts.get("backbone"), "row" in facts and row, "num_classes" in facts and classes]
    print(f"{weights.path}: {', '.join(filter(None, parts))}, {len(weights.tensors)} tensors")
    for note in weights.notes:
        print(f"  {note}")


def _print_use_in_torchvision(weights: "Weights") -> None:
    from fpn_ablate.weights.names import MASK

    backbone = weights.facts["backbone"] if weights.facts["backbone"] != "resnet" else "resnet..."
    if not any(name.startswith("neck.") for name in weights.tensors):
        print(f"for torchvision.models.{backbone}; without the classifier, so load it with strict=False")
        return
    parts = [part for part in ("rpn", "roi") if any(name.startswith(f"{part}.") for name in weights.tensors)]
    classes = f", num_classes={int(weights.facts['num_classes']) + 1}" if "roi" in parts else ""
    partial = "" if len(parts) == 2 else f"; it has {parts[0] if parts else 'none'} of the heads, so load it with strict=False"
    masks = any(name.startswith(MASK) for name in weights.tensors)
    network, rows = ("MaskRCNN", "box deltas and masks") if masks else ("FasterRCNN", "box deltas")
    print(f"for {network}(resnet_fpn_backbone(backbone_name='{backbone}', weights=None){classes}){partial}")
    print(f"{rows} of background, which are not trained, are 0; what else it computes with is to be set there:")
    for key, value in json.loads(weights.facts.get("settings", "{}")).items():
        print(f"  {key}={json.dumps(value)}")


def _refuse_place(source: Path, out: Path, suffix: str | None = None) -> None:
    if out.exists() and out.samefile(source):
        raise UserError(f"{out}: it would replace the file that is read; give another name")
    if not out.name:
        raise UserError(f"{out}: give the name of a file")
    if suffix and out.suffix != suffix:
        raise UserError(f"{out}: give it a name that ends in {suffix}, as {out.with_suffix(suffix)}")


def _std(text: str) -> tuple[float, float, float]:
    """Parse one number for all colours, or three."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in (1, 3) or not all(0 < value < float("inf") for value in values):
        raise argparse.ArgumentTypeError(f"{text!r}: give one number above 0, or three as 57.375,57.12,58.395")
    return tuple(values * (3 if len(values) == 1 else 1))


def _eps(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text}: give a number of at least 0 and below 1, as 0 or 1e-3")
    return value


def _parser() -> Parser:
    parser = command_parser("weights", "Import weights of torchvision and detectron2, and export ours.")
    commands = parser.add_subparsers(dest="command", required=True)
    bring = commands.add_parser("import", help="a file of another program to a safetensors file of ours")
    bring.add_argument("file", type=Path, help="state dict of torchvision (.pth), pickle of detectron2 (.pkl); nothing is run")
    bring.add_argument("out", type=Path, metavar="OUT.safetensors")
    bring.add_argument(
        "--bn-eps",
        type=_eps,
        metavar="EPS",
        help="what the file's batch norms add to the variance; ours add 1e-5, and scales are changed so that both compute the "
        "same. No file says it. Give 0 for torchvision's released detectors COCO_V1 (fasterrcnn_resnet50_fpn_coco), which "
        "torchvision runs with 0; otherwise leave it out",
    )
    bring.add_argument(
        "--pixel-std",
        type=_std,
        metavar="STD",
        help="detectron2 alone: PIXEL_STD of its configuration. No file says it. 1 (default: the model zoo's R50 and R101), or "
        "58.395,57.12,57.375 with --rgb (self-supervised ResNets such as MoCo's); a file of another author needs it",
    )
    bring.add_argument("--rgb", action="store_true", help="detectron2 alone: INPUT.FORMAT was RGB (default: BGR)")
    bring.add_argument("--keep-classes", action="store_true", help="keep all 91 rows of a COCO detector of torchvision")
    send = commands.add_parser("export", help="a run's weights, or a file of ours, for other programs")
    send.add_argument("file", type=Path, metavar="RUN_OR_FILE", help="folder of a finished run, or a file of weights")
    send.add_argument("out", type=Path, help="the file to write, as torchvision's .pth or .safetensors")
    formats = "torchvision: a state dict that its networks load; safetensors: ours, as a backbone's or a row's weights"
    send.add_argument("--to", required=True, choices=["torchvision", "safetensors"], help=formats)
    return parser

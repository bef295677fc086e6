"""Import weights of torchvision and detectron2, and export ours: `python -m fpn_ablate weights import|export`."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from fpn_ablate.cli.parser import Parser, command_parser
from fpn_ablate.utils.errors import UserError
from fpn_ablate.weights.convert import BN_EPS, Options, Weights, to_torchvision
from fpn_ablate.weights.files import write_safetensors, write_torch
from fpn_ablate.weights.layout import expected_shapes, misfit, shapes_of
from fpn_ablate.weights.loading import open_weights

SUFFIX = ".safetensors"


def main(arguments: Sequence[str], config_dir: Path | None = None) -> int:
    """Write the file.

    Raises:
        UserError: the file cannot be read, does not fit what it looks like, or the place is wrong.
    """
    options = _parser().parse_args(arguments)
    (_import if options.command == "import" else _export)(options)
    return 0


def _import(options: argparse.Namespace) -> None:
    _refuse_place(options.file, options.out, SUFFIX)
    unstated = Options(options.bn_eps, options.pixel_std, True if options.rgb else None, options.keep_classes)
    weights = open_weights(options.file, unstated)
    _tell(weights)
    write_safetensors(options.out, weights.tensors, weights.facts)
    print(f"written: {options.out}")


def _export(options: argparse.Namespace) -> None:
    weights = open_weights(options.file)
    if options.to == "safetensors":
        _refuse_place(weights.stored.path, options.out, SUFFIX)
        _tell(weights)
        write_safetensors(options.out, weights.tensors, weights.facts)
    else:
        _refuse_place(weights.stored.path, options.out)
        write_torch(options.out, _for_torchvision(weights))
    print(f"written: {options.out}")


def _for_torchvision(weights: Weights) -> dict:
    tensors, path = to_torchvision(weights), weights.stored.path
    if problem := misfit(expected_shapes(weights.tensors), shapes_of(weights.tensors)):
        raise UserError(f"{path}: torchvision has no such network; beside its own (names are ours) {problem}")
    _tell(weights)
    backbone = weights.facts.get("backbone", "resnet...")
    if not any(name.startswith("neck.") for name in weights.tensors):
        print(f"for torchvision.models.{backbone}; without the classifier, so load it with strict=False")
        return tensors
    parts = [part for part in ("rpn", "roi") if any(name.startswith(f"{part}.") for name in weights.tensors)]
    classes = f", num_classes={int(weights.facts['num_classes']) + 1}" if "roi" in parts else ""
    partial = (
        "" if len(parts) == 2 else f"; of the heads {parts[0] if parts else 'nothing'} alone, so load it with strict=False"
    )
    print(f"for FasterRCNN(resnet_fpn_backbone(backbone_name='{backbone}', weights=None){classes}){partial}")
    print("box deltas of background, which are not trained, are 0; what else it computes with is to be set there:")
    for key, value in json.loads(weights.facts.get("settings", "{}")).items():
        print(f"  {key}={json.dumps(value)}")
    return tensors


def _tell(weights: Weights) -> None:
    facts = [weights.source, weights.facts.get("backbone"), weights.facts.get("row") and f"row {weights.facts['row']}"]
    classes = weights.facts.get("num_classes")
    facts.append(f"{classes} classes" if classes else None)
    print(f"{weights.stored.path}: {', '.join(filter(None, facts))}, {len(weights.tensors)} tensors")
    for note in weights.notes:
        print(f"  {note}")


def _refuse_place(source: Path, out: Path, suffix: str | None = None) -> None:
    if out.exists() and source.exists() and out.samefile(source):
        raise UserError(f"{out}: it would replace the file that is read; give another name")
    if out.is_dir():
        raise UserError(f"{out}: a folder; give the name of a file")
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
    bring.add_argument("out", type=Path, metavar=f"OUT{SUFFIX}")
    bring.add_argument(
        "--bn-eps",
        type=_eps,
        default=BN_EPS,
        metavar="EPS",
        help="what the file's batch norms add to the variance; ours add 1e-5, and variances are moved so that both compute the "
        "same. No file says it. Give 0 for torchvision's released detectors COCO_V1 (fasterrcnn_resnet50_fpn_coco), which "
        "torchvision runs with 0; otherwise leave it out",
    )
    bring.add_argument(
        "--pixel-std",
        type=_std,
        metavar="STD",
        help="detectron2 alone: PIXEL_STD of its configuration. No file says it. 1 (default: the model zoo's R50 and R101), or "
        "57.375,57.12,58.395 in the order of its colours (models with torchvision-like strides, X101)",
    )
    bring.add_argument("--rgb", action="store_true", help="detectron2 alone: INPUT.FORMAT was RGB (default: BGR)")
    bring.add_argument("--keep-classes", action="store_true", help="keep all 91 rows of a COCO detector of torchvision")
    send = commands.add_parser("export", help="a run's weights, or a file of ours, for other programs")
    send.add_argument("file", type=Path, metavar="RUN_OR_FILE", help="folder of a finished run, or a file of weights")
    send.add_argument("out", type=Path)
    send.add_argument("--to", required=True, choices=["torchvision", "safetensors"])
    return parser

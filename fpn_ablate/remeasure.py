"""Latency of finished runs, measured again one run after the other: what else a machine does in a sweep spoils it.

`python -m fpn_ablate.remeasure results/runs` puts the new figures into the records; tables are made anew with
`python -m fpn_ablate.report results/runs`.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from fpn_ablate import record, tasks
from fpn_ablate.data.sample import DetectionDataset
from fpn_ablate.errors import UserError
from fpn_ablate.files import UNREADABLE
from fpn_ablate.inputs import Inputs, given_proposals, load_data, pick_device
from fpn_ablate.run import find, latency_of
from fpn_ablate.schema import Config
from fpn_ablate.validation import kept

Splits = dict[str, tuple[DetectionDataset, DetectionDataset]]


def finished(folder: Path, splits: Splits) -> tuple[Config, dict[str, Any], tuple[DetectionDataset, DetectionDataset]]:
    """Configuration, record and data of the finished run of a folder below <out>/runs. `splits` keeps what has been loaded.

    Raises:
        UserError: the run is not finished, or what it is made of is no longer there.
    """
    known = record.read(folder) or {}
    if known.get("status") != "finished":
        raise UserError(f"{folder}: no finished run")
    cfg = kept(yaml.safe_load((folder / "config.yaml").read_text()))
    cfg = cfg.model_copy(update={"out": str(folder.resolve().parents[4])})
    data = str((cfg.mode, cfg.data, cfg.recipe.short_side, cfg.recipe.max_side, cfg.recipe.eval_images))
    if data not in splits:
        splits[data] = load_data(cfg)
    return cfg, known, splits[data]


def restore(folder: Path, splits: Splits) -> tuple[tasks.Trained, Config, torch.device]:
    """The finished run of a folder, with its weights.

    Raises:
        UserError: as `finished`, or the run was made on another device.
    """
    cfg, known, loaded = finished(folder, splits)
    device, made_on = pick_device(cfg), known["environment"]
    if record.device_name(device) != made_on["device"]:
        raise UserError(f"{folder}: made on {made_on['device']}, and this is {record.device_name(device)}; measure it there")
    torch.set_num_threads(made_on["threads"])
    inputs = Inputs(device, *loaded, None, None, *given_proposals(cfg, loaded))
    cell = tasks.Cell(cfg, inputs, folder, known["fingerprint"], {}, lambda step, values: None)
    if "rpn" in tasks.sources(cfg):
        source = find(cfg, known["proposals"]["fingerprint"])
        if source is None:
            raise UserError(f"{folder}: the run {known['proposals']['fingerprint'][:8]}, whose RPN it uses, is gone")
        cell.sources["rpn"] = source
    return tasks.restore(cell, tasks.supplied(cell)), cfg, device


def over_runs(argv: Sequence[str] | None, command: str, about: str, work: Callable[[Path, Splits], str]) -> int:
    """A command over finished runs: `work` on each, with a line of what it says; 2 where a run is left as it was.

    Args:
        work: is given the folder of a run and `splits` (see `finished`).
    """
    parser = argparse.ArgumentParser(prog=f"python -m {command}", description=about)
    parser.add_argument("runs", nargs="+", type=Path, help="a folder of runs, as results/runs, or of one run")
    given = parser.parse_args(argv)
    files = sorted(file for folder in given.runs for file in folder.rglob(record.FILE))
    if not files:
        print(f"no {record.FILE} below {', '.join(map(str, given.runs))}", file=sys.stderr)
        return 2
    splits: Splits = {}
    problems = 0
    for folder in (file.parent for file in files):
        try:
            print(work(folder, splits))
        except (UserError, *UNREADABLE) as error:
            print(f"left as it was: {folder}: {error}", file=sys.stderr)
            problems += 1
    print(f"tables with all that is new: python -m fpn_ablate.report {' '.join(map(str, given.runs))}")
    return 2 if problems else 0


def main(argv: Sequence[str] | None = None) -> int:
    measured: dict[str, float] = {}  # a run that stands in several tables has one latency

    def measure(folder: Path, splits: Splits) -> str:
        known = record.read(folder) or {}
        name = str(known.get("fingerprint"))
        if name not in measured:
            measured[name] = latency_of(*restore(folder, splits))
        before, known["cost"]["latency_ms"] = known["cost"]["latency_ms"], measured[name]
        record.write(folder, known)
        return f"{known['table']} {known['row']} seed {known['seed']}: {measured[name]} ms, was {before}"

    return over_runs(argv, "fpn_ablate.remeasure", __doc__.splitlines()[0], measure)


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python
"""Time the six rows of Table 1 row by row and several at once, to see which is faster on this machine.

    python scripts/benchmarks/sweep.py [--jobs 1 2] [--recipe quick] [--device cpu|cuda] [--out FILE] [--readme FILE]

Each way is the command that a user types, timed from the interpreter's start to the report page, with an output folder and a
cache of its own. A backbone that is pre-trained here, which all share, is made before and timed by itself. The last line is a
second start of a finished sweep. Rows that run at once share the cores.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from fpn_ablate.runs.environment import environment, machine
from fpn_ablate.utils.blocks import fill_blocks
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.files import save_text

BLOCK = "sweep"  # of a README
# Rows that take long come first: they end at about the same time.
ROWS = "ablation=fpn,bottom_up,no_lateral,finest,c5,c4"


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        if options.readme:
            fill_blocks(options.readme.read_text(encoding="utf-8"), BLOCK, str)  # fail now, not after minutes of work
        results = measure(options.recipe, options.jobs, options.device)
    except (OSError, UserError) as error:
        print(error, file=sys.stderr)
        return 2
    print(markdown(results))
    if options.out:
        save_text(options.out, json.dumps(results, indent=1) + "\n")
    if options.readme:
        text = fill_blocks(options.readme.read_text(encoding="utf-8"), BLOCK, lambda _: markdown(results))
        save_text(options.readme, text)
    return 0


def measure(recipe: str, jobs: list[int], device: str) -> dict[str, Any]:
    """Measure wall and processor seconds of each number of jobs. Raises UserError: a sweep failed."""
    common, torch_device = [f"recipe={recipe}", f"device={device}"], torch.device(device)
    commit = environment(torch_device)["commit"]
    results: dict[str, Any] = {"machine": {**machine(torch_device), "commit": commit}, "recipe": recipe, "ways": {}}
    results["machine"]["load before"] = round(os.getloadavg()[0], 1)
    with tempfile.TemporaryDirectory(prefix="bench-sweep-") as name:
        folder = Path(name)
        _sweep(folder / "first", [*common, "recipe.steps=1", "recipe.eval_images=1"])
        results["pre-training (s)"] = _costs(folder / "first")["pretrain_s"]
        for count in jobs:
            out, arguments = folder / str(count), ["-m", ROWS, *common]
            arguments += [f"jobs={count}", f"threads={max(1, (os.cpu_count() or 1) // count)}"]
            if (backbones := folder / "first" / "backbones").exists():
                shutil.copytree(backbones, out / "backbones")
            results["ways"][f"{count} at once" if count > 1 else "row by row"] = {
                **_sweep(out, arguments),
                **{f"{part[:-2]}, all rows (s)": seconds for part, seconds in _costs(out).items() if part != "pretrain_s"},
            }
        results["ways"]["a finished sweep again"] = _sweep(out, arguments)
    return results


def _sweep(out: Path, arguments: list[str]) -> dict[str, float]:
    """Run a command and return its seconds."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    command = [sys.executable, "-m", "fpn_ablate", *arguments, f"out={out}"]
    cache = {"FPN_ABLATE_CACHE": f"{out}-cache"}  # so that each way renders the pictures
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | cache)
    took, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise UserError(f"{' '.join(command)} ended with code {done.returncode}:\n{done.stderr[-2000:]}")
    processor = sum(getattr(after, kind) - getattr(before, kind) for kind in ("ru_utime", "ru_stime"))
    return {"wall (s)": round(took, 1), "processor (s)": round(processor, 1)}


def _costs(out: Path) -> dict[str, float]:
    """Sum the seconds of the runs in a folder; they share one pre-training."""
    costs = [json.loads(path.read_text())["cost"] for path in sorted((out / "runs").rglob("record.json"))]
    sums = {part: round(sum(cost[part] for cost in costs), 1) for part in ("train_s", "eval_s")}
    return {"pretrain_s": costs[0]["pretrain_s"], **sums}


def markdown(results: dict[str, Any]) -> str:
    """Format the results of --out as a table for a README."""
    header = list(next(iter(results["ways"].values())))
    lines = [["six rows", *header], ["---", *["---:"] * len(header)]]
    lines += [[way, *(str(figures.get(name, "")) for name in header)] for way, figures in results["ways"].items()]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    facts = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    pretraining = f"; pre-training, once before: {seconds} s" if (seconds := results["pre-training (s)"]) else ""
    return f"{table}\nRecipe {results['recipe']}{pretraining}. Machine: {facts}.\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python scripts/benchmarks/sweep.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--jobs", type=int, nargs="+", default=[1, 2], metavar="N", help="numbers of rows at once (default: 1 2)"
    )
    parser.add_argument("--recipe", default="quick", help="default: quick")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--readme", type=Path, metavar="FILE", help=f"update the block '<!-- {BLOCK} -->' of this file")
    return parser


if __name__ == "__main__":
    sys.exit(main())

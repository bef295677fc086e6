"""Start several equal sweeps at once over one folder, on simulated GPUs, and compare them with a sweep that is alone.

    python scripts/drills/several.py two     two sweeps on two GPUs take at most 0.65 of the time of one
    python scripts/drills/several.py four    four sweeps on four GPUs train each cell once

A simulated GPU is a name in CUDA_VISIBLE_DEVICES: sweeps share them as they share real ones, and train on the processor. The
processor time of a sweep is the time that it takes on a core of its own, whatever else runs on the machine; the time on the
clock is saved too. Outcomes are written as those of kills.py.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kills import EQUAL, contents, differing_results, outcome, trainings
from reliability import OUTCOMES, save

COMMON = ["-m", "recipe=smoke", "device=auto", "threads=1", "jobs=1", "log.wandb=disabled"]
# Start and tables take a sweep 27 s of processor time; with 60 steps, 3 s a cell, they decided.
TWO = [*COMMON, "recipe.steps=300", "ablation=c4,c5,fpn,bottom_up,no_lateral,finest", "seed=0,1"]
# Table 1 and Table 2: pre-training, three RPNs, proposals of one of them, three second stages on these.
FOUR = [*COMMON, "backbone.weights=pretrain", "task=rpn,fast_rcnn", "ablation=c4,fpn,bottom_up"]
MOST = 0.65  # of the time of one sweep
CELLS = {"two": 12, "four": 6}


def run(folder: Path, overrides: Sequence[str], sweeps: int, gpus: int) -> tuple[list[dict[str, float]], list[str]]:
    """Run equal sweeps at once in a folder; return the seconds that each took, and what each printed.

    Raises:
        SystemExit: one failed.
    """
    folder.mkdir()
    visible = ",".join(f"GPU-drill-{os.getpid()}-{number}" for number in range(gpus))
    environment = os.environ | {"FPN_ABLATE_PAGE": "off", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": visible}
    logs = [folder / f"log{number}.txt" for number in range(sweeps)]
    begun, processes, seconds = time.monotonic(), {}, {}
    for log in logs:
        with log.open("w") as file:
            command = [sys.executable, "-m", "fpn_ablate", *overrides]
            process = subprocess.Popen(command, cwd=folder, stdout=file, stderr=file, env=environment)
            processes[process.pid] = log
    for _ in logs:
        process, status, usage = os.wait3(0)
        if status:
            raise SystemExit(processes[process].read_text())
        times = {"clock": time.monotonic() - begun, "processor": usage.ru_utime + usage.ru_stime}
        seconds[processes[process]] = {name: round(value, 1) for name, value in times.items()}
    return [seconds[log] for log in logs], [log.read_text() for log in logs]


def check(name: str, folder: Path, alone: Path, logs: Sequence[str]) -> tuple[int, list[str]]:
    """Return the number of trainings, and what is not as it should be."""
    trained = trainings(logs)
    used = sorted(gpu for log in logs for gpu in re.findall(r"on GPU (\S+)", log))
    findings = [f"{trained} trainings"] * (trained != CELLS[name])
    findings += [f"GPUs used: {used}"] * (len(set(used)) != len(logs))
    differing = differing_results(contents(alone / "results"), folder / "results")
    return trained, findings + [f"{item} differs" for item in differing]


def two(work: Path) -> dict[str, Any]:
    """Compare the time of two sweeps at once with that of one."""
    (one,), _ = run(work / "alone", TWO, 1, 2)
    pair, logs = run(work / "pair", TWO, 2, 2)
    trained, findings = check("two", work / "pair", work / "alone", logs)
    ratios = {kind: round(max(each[kind] for each in pair) / one[kind], 2) for kind in one}
    findings += [f"{ratios['processor']} of the time of one sweep"] * (ratios["processor"] > MOST)
    how = f"{trained} trainings; the longer one takes {ratios['processor']} of the processor time of one sweep; {EQUAL}"
    return outcome("two equal sweeps of 12 runs at once, on two simulated GPUs", 1, findings, how) | {
        "seconds of one": one,
        "seconds of two": pair,
        "ratios": ratios,
        "load": os.getloadavg()[0],
    }


def four(work: Path) -> dict[str, Any]:
    """Count the trainings of four sweeps at once."""
    run(work / "alone", FOUR, 1, 1)
    _, logs = run(work / "four", FOUR, 4, 4)
    trained, findings = check("four", work / "four", work / "alone", logs)
    how = f"{trained} trainings, each sweep on a GPU of its own; {EQUAL}"
    return outcome("four equal sweeps of 6 runs at once, on four simulated GPUs", 1, findings, how)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a drill and save its outcome; return 0 if nothing was lost."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drill", choices=CELLS)
    parser.add_argument("--json", type=Path, help="default: results/reference/reliability/several-<drill>.json")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as work:
        result = {"two": two, "four": four}[options.drill](Path(work))
    file = options.json or OUTCOMES / f"several-{options.drill}.json"
    print(save(file, f"python scripts/drills/several.py {shlex.join(arguments)}", result))
    return int(result["lost"] > 0)


if __name__ == "__main__":
    sys.exit(main())

"""Drills: sweeps that are killed, interrupted or run twice at once, held against one that was left alone.

    python scripts/drills/kills.py chaos      a sweep of 6 cells, killed (SIGKILL) at 50 seeded moments and started again until done
    python scripts/drills/kills.py preempted  the same with SIGTERM, 20 times: within 10 s exit code 143, no cell is left as running
    python scripts/drills/kills.py ctrl-c     the same with SIGINT, 20 times: exit code 130
    python scripts/drills/kills.py preempted-joblib, ctrl-c-joblib    the same of a sweep with joblib's two workers
    python scripts/drills/kills.py together   two sweeps over the same 6 cells at the same time: 6 trainings in all
    python scripts/drills/kills.py worker     joblib with two workers, of which one is killed now and then: the sweep ends by itself

A signal goes to the whole process group of the sweep, as SLURM and a terminal send it. Each drill writes its outcome to
results/reference/reliability/<drill>.json; scripts/drills/reliability.py makes the page of them. On a CPU, since there the same seed
gives the same bits.
"""

import argparse
import dataclasses
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fpn_ablate.evaluation.coco import DetectionSet
from fpn_ablate.report.collate.collate import collate, records
from fpn_ablate.report.formats.tables import csv_text, latex, markdown
from fpn_ablate.runs.environment import environment, machine
from fpn_ablate.utils.files import save_text
from fpn_ablate.utils.paths import DETECTIONS, METRICS, MODEL

ROOT = Path(__file__).resolve().parents[2]
OUTCOMES = ROOT / "results" / "reference" / "reliability"
# Table 1 and Table 2: pre-training, three RPNs, proposals of one of them, three second stages on these.
CELLS = ["-m", "recipe=smoke", "device=cpu", "threads=1", "task=rpn,fast_rcnn", "ablation=c4,fpn,bottom_up"]
JOBLIB = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
GRACE = 10  # seconds from a signal to the end; the least that is usual between SIGTERM and SIGKILL (Docker, `timeout -k`)
# What is measured, and so differs from run to run: what it took, and where and when it was.
MEASURED, WHEN = ("cost", "built_on"), ("started", "finished")


@dataclasses.dataclass
class Tally:
    """What a drill saw. `tries`: signals that were sent; `lost`: each finding in `findings` is one."""

    tries: int = 0
    rounds: int = 0
    findings: list[str] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)  # from a signal to the end of the process
    marked: list[float] = dataclasses.field(default_factory=list)  # from a signal to the record that says so
    cells: dict[str, int] = dataclasses.field(default_factory=dict)  # what the cell under way was doing, by its files


def start(out: Path, extra: Sequence[str] = ()) -> subprocess.Popen:
    """The sweep, in a process group of its own, writing below `out`."""
    out.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"WANDB_MODE": "disabled", "FPN_ABLATE_PAGE": "off", "OMP_NUM_THREADS": "1"}
    with (out / "log.txt").open("a") as log:
        command = [sys.executable, "-m", "fpn_ablate", *CELLS, *extra, "out=results"]
        return subprocess.Popen(command, cwd=out, stdout=log, stderr=log, env=environment, start_new_session=True)


def contents(out: Path) -> dict[str, Any]:
    """All that a finished sweep leaves and that is no duration, by name, in a form that `==` compares.

    Raises whatever reading a damaged file raises.
    """
    found: dict[str, Any] = {}
    for file in sorted(Path(out, "runs").glob("*/*/*/*/record.json")):
        folder, name = file.parent, str(file.parent.relative_to(out))
        known = json.loads(file.read_text())
        known["environment"].pop("command", None)
        found[f"{name}/record"] = {key: value for key, value in known.items() if key not in (*MEASURED, *WHEN)}
        weights = torch.load(folder / MODEL, weights_only=True)
        found[f"{name}/weights"] = {key: value.numpy().tobytes() for key, value in weights.items()}
        detections = DetectionSet.load(folder / DETECTIONS)
        found[f"{name}/detections"] = [
            np.asarray(getattr(detections, f.name)).tobytes() for f in dataclasses.fields(detections)
        ]
        found[f"{name}/metrics"] = (folder / METRICS).read_text()
        found[f"{name}/files"] = sorted(path.name for path in folder.iterdir())
    return found | tables(out)


def tables(out: Path) -> dict[str, bytes]:
    """The tables of a folder of results, made of its records with every measured duration set to 1."""
    with tempfile.TemporaryDirectory() as temporary:
        for file in sorted(Path(out, "runs").glob("*/*/*/*/record.json")):
            known = json.loads(file.read_text())
            known["environment"].pop("command", None)
            known["cost"] = {key: 1.0 if isinstance(value, float | int) else value for key, value in known["cost"].items()}
            known |= {"built_on": [[name, 1.0] for name, _ in known["built_on"]]} | dict.fromkeys(
                WHEN, "2000-01-01T00:00:00+00:00"
            )
            place = Path(temporary, file.parent.relative_to(out))
            place.mkdir(parents=True)
            (place / "record.json").write_text(json.dumps(known))
            shutil.copy(file.parent / "resampled.npz", place)
        made = collate.collate(records.load(Path(temporary, "runs")))
    kinds = {"md": markdown, "csv": csv_text, "tex": latex}
    return {f"{table.name}.{kind}": text(table).encode() for table in made for kind, text in kinds.items()}


def finished(out: Path) -> dict[str, str]:
    """Cells that are over -> when they were. A record that cannot be read is a torn file, which the caller hears of."""
    known = {str(f.parent.relative_to(out)): json.loads(f.read_text()) for f in Path(out, "runs").glob("*/*/*/*/record.json")}
    return {name: found["finished"] for name, found in known.items() if found["status"] == "finished"}


def differences(whole: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return sorted(name for name in whole.keys() | other.keys() if whole.get(name) != other.get(name))


def stage(out: Path) -> str:
    """What was under way, as far as files tell."""
    running = [f.parent for f in Path(out, "runs").glob("*/*/*/*/record.json") if '"status": "running"' in f.read_text()]
    if not running:
        return "between cells" if finished(out) else "before the first cell"
    names = {path.name for path in running[0].iterdir()}
    written = [name for name in (DETECTIONS, MODEL, "checkpoint.pt", METRICS) if name in names]
    return f"a cell with {written[0]}" if written else "a cell without metrics"


def torment(
    begin: Callable[[], Any],
    out: Callable[[int], Path],
    whole: dict[str, Any],
    tries: int,
    seed: int,
    within: float,
    number: int,
) -> Tally:
    """Start, strike at a random moment up to `within` seconds later, start again, and, when all is done, begin a new round; the
    last one is left to end. `begin(folder)` gives a process (`poll`, `wait`, `pid`), the leader of its group."""
    chance, tally = random.Random(seed), Tally()
    while tally.tries < tries:
        folder, before = out(tally.rounds), {}
        while True:
            process = begin(folder)
            if tally.tries < tries:
                _wait(process, chance.uniform(0, within))
            code = process.poll() if tally.tries < tries else process.wait()
            if code is not None:
                break
            _strike(process, folder, number, tally)
            before = _kept(folder, before, tally)
        tally.findings += [f"round {tally.rounds}: exit code {code}"] * (code != 0)
        tally.findings += [f"round {tally.rounds}: {name} differs" for name in differences(whole, contents(folder))]
        tally.rounds += 1
    return tally


def _wait(process: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)


def _strike(process: Any, folder: Path, number: int, tally: Tally) -> None:
    at = stage(folder)
    tally.cells[at] = tally.cells.get(at, 0) + 1
    struck, on_disk = time.monotonic(), time.time()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
    code = process.wait()
    tally.seconds.append(round(time.monotonic() - struck, 2))
    tally.tries += 1
    if tally.seconds[-1] > GRACE:  # one that is swallowed ends as if there had been none: later, and with 0
        tally.findings.append(f"signal {tally.tries}, {at}: exit code {code} after {tally.seconds[-1]} s")
    if number != signal.SIGKILL:
        _gracefully(code, folder, number, tally)
        marked = [f.stat().st_mtime for f in folder.glob("runs/*/*/*/*/record.json") if '"interrupted"' in f.read_text()]
        tally.marked += [round(when - on_disk, 2) for when in marked if when > on_disk]


def _gracefully(code: int, folder: Path, number: int, tally: Tally) -> None:
    """The exit code says so (before the program has begun to listen, the system's), and no cell is left as if it ran."""
    if code not in (0, 128 + number, -number):
        tally.findings.append(f"signal {tally.tries}: exit code {code}")
    left = [f for f in Path(folder, "runs").glob("*/*/*/*/record.json") if '"status": "running"' in f.read_text()]
    tally.findings += [f"signal {tally.tries}: {file.parent} is left as running" for file in left]


def _kept(folder: Path, before: dict[str, str], tally: Tally) -> dict[str, str]:
    """What is finished now; a finding for each cell that was and is no more, and for a file that is half there."""
    try:
        now = finished(folder)
    except ValueError as error:
        tally.findings.append(f"signal {tally.tries}: a torn record ({error})")
        return before
    tally.findings += [f"signal {tally.tries}: {name} was finished" for name in before if now.get(name) != before[name]]
    return now


# ------------------------------------------------------------------------------------------------------------ the drills


def undisturbed(work: Path, extra: Sequence[str] = ()) -> tuple[dict[str, Any], float]:
    """What a sweep leaves that is left alone, and its seconds."""
    begun, process = time.monotonic(), start(work, extra)
    if process.wait():
        raise SystemExit((work / "log.txt").read_text())
    return contents(work / "results"), time.monotonic() - begun


def struck(
    options: argparse.Namespace, work: Path, number: int, tries: int, fault: str, how: str, extra: Sequence[str] = ()
) -> dict[str, Any]:
    whole, took = undisturbed(work / "whole", extra)
    places: Callable[[int], Path] = lambda n: work / f"round{n}" / "results"  # noqa: E731
    within = options.within or 0.4 * took
    tally = torment(lambda out: start(out.parent, extra), places, whole, options.tries or tries, options.seed, within, number)
    sweep = f"a sweep of 6 cells{', by two workers of joblib' if extra else ''}"
    return outcome(f"{fault}, at a random moment of {sweep}", tally.tries, tally.findings, how) | {
        "sweeps": tally.rounds,
        "under way": dict(sorted(tally.cells.items())),
        "seconds from signal to end": {"median": sorted(tally.seconds)[len(tally.seconds) // 2], "most": max(tally.seconds)},
        **({"seconds from signal to the record that says so": {"most": max(tally.marked)}} if tally.marked else {}),
    }


EQUAL = (
    "weights, detections, metrics, records and tables of every sweep equal, to the byte, those of one that was left alone "
    "(without measured durations)"
)


def chaos(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    how = f"{EQUAL}; what was finished stayed so; no record was torn"
    return struck(options, work, signal.SIGKILL, 50, "SIGKILL", how)


def preempted(options: argparse.Namespace, work: Path, extra: Sequence[str] = ()) -> dict[str, Any]:
    how = f"{EQUAL}; exit code 143 within {GRACE} s, no cell left as running"
    return struck(options, work, signal.SIGTERM, 20, "SIGTERM to the process group", how, extra)


def ctrl_c(options: argparse.Namespace, work: Path, extra: Sequence[str] = ()) -> dict[str, Any]:
    how = f"{EQUAL}; exit code 130 within {GRACE} s, no cell left as running"
    return struck(options, work, signal.SIGINT, 20, "Ctrl-C", how, extra)


def together(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    (whole, _), findings, tries, trained = undisturbed(work / "whole"), [], options.tries or 3, []
    for n in range(tries):
        folders = [work / f"pair{n}" / name for name in "ab"]
        for folder in folders:
            folder.mkdir(parents=True)
            (folder / "results").symlink_to(work / f"pair{n}" / "results")
        (work / f"pair{n}" / "results").mkdir()
        with ThreadPoolExecutor(2) as pool:
            codes = list(pool.map(lambda folder: start(folder).wait(), folders))
        said = "".join((folder / "log.txt").read_text() for folder in folders)
        trained.append(len(re.findall(r"seed \d+: finished, ", said)))
        findings += [f"pair {n}: exit codes {codes}"] * any(codes)
        findings += [f"pair {n}: {trained[-1]} trainings"] * (trained[-1] != 6)
        findings += [f"pair {n}: {name} differs" for name in differences(whole, contents(work / f"pair{n}" / "results"))]
    how = f"trainings of each pair of sweeps: {', '.join(map(str, trained))}; {EQUAL}"
    return outcome("two sweeps over the same 6 cells at the same time", tries, findings, how)


def worker(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    (whole, took), chance, findings, tries, sweeps = undisturbed(work / "whole"), random.Random(options.seed), [], 0, 0
    while tries < (options.tries or 5):
        out = work / f"sweep{sweeps}"
        process = start(out, JOBLIB)
        _wait(process, chance.uniform(0.2, 0.8) * (options.within or took))
        workers = _workers(process.pid)
        if process.poll() is None and workers:
            os.kill(chance.choice(workers), signal.SIGKILL)
            tries += 1
        code = process.wait()
        findings += [f"sweep {sweeps}: exit code {code}"] * (code != 0)
        findings += [f"sweep {sweeps}: {name} differs" for name in differences(whole, contents(out / "results"))]
        sweeps += 1
    how = f"the sweep went on by itself to exit code 0; {EQUAL}"
    return outcome("one of joblib's two workers is killed", tries, findings, how)


def _workers(parent: int) -> list[int]:
    """Processes of joblib below a sweep."""
    found = subprocess.run(["pgrep", "-P", str(parent), "-f", "LokyProcess"], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def outcome(fault: str, tries: int, findings: Iterable[str], how: str) -> dict[str, Any]:
    findings = list(findings)
    return {"fault": fault, "tries": tries, "lost": len(findings), "how": how, "findings": findings}


DRILLS = {"chaos": chaos, "preempted": preempted, "ctrl-c": ctrl_c, "together": together, "worker": worker}
DRILLS |= {f"{name}-joblib": partial(DRILLS[name], extra=JOBLIB) for name in ("preempted", "ctrl-c")}


def main(argv: Sequence[str] | None = None) -> int:
    """0: nothing was lost."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drill", choices=DRILLS)
    parser.add_argument("--tries", type=int, default=0, help="how often the fault strikes (default: the drill's own)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument(
        "--within", type=float, help="seconds after a start within which it strikes (default: 0.4 of a sweep's)"
    )
    parser.add_argument("--json", type=Path, help="default: results/reference/reliability/<drill>.json")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell has started this in the background
    with tempfile.TemporaryDirectory() as work:
        found = DRILLS[options.drill](options, Path(work))
    found |= {
        "command": f"python scripts/drills/kills.py {shlex.join(arguments)}",
        "machine": machine(torch.device("cpu")),
        "commit": environment(torch.device("cpu"))["commit"],
    }
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    save_text(options.json or OUTCOMES / f"{options.drill}.json", text)
    print(text)
    return int(found["lost"] > 0)


if __name__ == "__main__":
    sys.exit(main())

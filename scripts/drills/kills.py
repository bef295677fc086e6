"""Kill, interrupt or duplicate sweeps, and compare their results with those of an undisturbed sweep.

    python scripts/drills/kills.py DRILL

    chaos         SIGKILL at 50 seeded moments of a sweep of 6 runs, which is started again until it is done
    preempted     the same with SIGTERM, 20 times: exit code 143 within 10 s, no run is left as running
    ctrl-c        the same with SIGINT, 20 times: exit code 130
    preempted-joblib, ctrl-c-joblib    the same for a sweep with two joblib workers
    together      two sweeps over the same 6 runs at the same time: 6 trainings in all
    worker        one of two joblib workers is killed: the sweep finishes by itself
    wandb         wandb's service is killed or stopped at 12 moments of a sweep: its results do not change

A signal goes to the whole process group of the sweep, as SLURM and a terminal send it. Each drill writes its outcome to
results/reference/reliability/<drill>.json; scripts/drills/reliability.py makes the page from them. All run on a CPU, where the
same seed gives the same bits.
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
from reliability import OUTCOMES, save

from fpn_ablate.evaluation.coco import DetectionSet
from fpn_ablate.report.collate import records
from fpn_ablate.report.collate.collate import collate
from fpn_ablate.report.formats.tables import csv_text, latex, markdown
from fpn_ablate.utils.paths import DETECTIONS, METRICS, MODEL

# Table 1 and Table 2: pre-training, three RPNs, proposals of one of them, three second stages on these.
SMOKE = ["recipe=smoke", "backbone.weights=pretrain", "device=cpu", "threads=1", "jobs=1"]
CELLS = ["-m", *SMOKE, "task=rpn,fast_rcnn", "ablation=c4,fpn,bottom_up"]
JOBLIB = ["jobs=2"]
GRACE = 10  # seconds from a signal to the end: the usual minimum between SIGTERM and SIGKILL (Docker, `timeout -k`)
# Record entries that differ between runs: costs, where a run was built on, start and end.
MEASURED, WHEN = ("cost", "built_on"), ("started", "finished")
INCIDENTAL = {"command": None, "dirty": False}  # of the environment: a drill writes its outcome into the checkout


@dataclasses.dataclass
class Tally:
    """Counts and findings of a drill. `tries` counts the signals sent; each entry of `findings` counts as lost."""

    tries: int = 0
    rounds: int = 0
    findings: list[str] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)  # from a signal to the end of the process
    marked: list[float] = dataclasses.field(default_factory=list)  # from a signal to the record that tells of it
    stages: dict[str, int] = dataclasses.field(default_factory=dict)  # stage of the active run, by its files -> signals


def start(out: Path, extra: Sequence[str] = ()) -> subprocess.Popen:
    """Start the sweep in a process group of its own, writing below `out`."""
    out.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"FPN_ABLATE_PAGE": "off", "OMP_NUM_THREADS": "1"}
    with (out / "log.txt").open("a") as log:
        command = [sys.executable, "-m", "fpn_ablate", *CELLS, "log.wandb=disabled", *extra, "out=results"]
        return subprocess.Popen(command, cwd=out, stdout=log, stderr=log, env=environment, start_new_session=True)


def contents(out: Path) -> dict[str, Any]:
    """Collect what a finished sweep leaves, without durations, by name, in a form that `==` compares.

    Raises whatever reading a damaged file raises.
    """
    items: dict[str, Any] = {}
    for file in sorted(Path(out, "runs").glob("*/*/*/*/record.json")):
        folder, name = file.parent, str(file.parent.relative_to(out))
        record = json.loads(file.read_text())
        record["environment"] |= INCIDENTAL
        record["config"]["jobs"] = None  # of which a drill changes the number
        items[f"{name}/record"] = {key: value for key, value in record.items() if key not in (*MEASURED, *WHEN)}
        weights = torch.load(folder / MODEL, weights_only=True)
        items[f"{name}/weights"] = {key: value.numpy().tobytes() for key, value in weights.items()}
        detections = DetectionSet.load(folder / DETECTIONS)
        items[f"{name}/detections"] = [
            np.asarray(getattr(detections, f.name)).tobytes() for f in dataclasses.fields(detections)
        ]
        items[f"{name}/metrics"] = (folder / METRICS).read_text()
        items[f"{name}/files"] = sorted(path.name for path in folder.iterdir() if not path.name.startswith("wandb"))
    return items | tables(out)


def tables(out: Path) -> dict[str, bytes]:
    """Make the tables of a folder of results from its records, with every measured duration set to 1."""
    with tempfile.TemporaryDirectory() as temporary:
        for file in sorted(Path(out, "runs").glob("*/*/*/*/record.json")):
            record = json.loads(file.read_text())
            record["environment"] |= INCIDENTAL
            record["cost"] = {key: 1.0 if isinstance(value, float | int) else value for key, value in record["cost"].items()}
            record["built_on"] = [[name, 1.0] for name, _ in record["built_on"]]
            record |= dict.fromkeys(WHEN, "2000-01-01T00:00:00+00:00")
            place = Path(temporary, file.parent.relative_to(out))
            place.mkdir(parents=True)
            (place / "record.json").write_text(json.dumps(record))
            shutil.copy(file.parent / "resampled.npz", place)
        collated = collate(records.load(Path(temporary, "runs")))
    kinds = {"md": markdown, "csv": csv_text, "tex": latex}
    return {f"{table.name}.{kind}": text(table).encode() for table in collated for kind, text in kinds.items()}


def finished(out: Path) -> dict[str, str]:
    """Return finished run -> when it finished. Raises ValueError if a record is torn."""
    files = Path(out, "runs").glob("*/*/*/*/record.json")
    by_run = {str(file.parent.relative_to(out)): json.loads(file.read_text()) for file in files}
    return {name: record["finished"] for name, record in by_run.items() if record["status"] == "finished"}


def differences(expected: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """List the names of contents that differ or are missing on one side."""
    return sorted(name for name in expected.keys() | other.keys() if expected.get(name) != other.get(name))


def differing_results(expected: dict[str, Any], out: Path) -> list[str]:
    """List what differs in the results of a sweep by several processes.

    A row of Table 2 makes the RPN that it stands on if it comes first: that run, and its proposals, then lie below `sources`.
    """
    results = contents(out)
    differing = differences(expected, results)
    elsewhere = {name for name in expected.keys() ^ results.keys() if name.startswith("runs/sources/")}
    return [name for name in differing if name not in elsewhere and not (elsewhere and name.endswith("/files"))]


def stage(out: Path) -> str:
    """Tell from the files what the sweep was doing."""
    running = [f.parent for f in Path(out, "runs").glob("*/*/*/*/record.json") if '"status": "running"' in f.read_text()]
    if not running:
        return "between runs" if finished(out) else "before the first run"
    names = {path.name for path in running[0].iterdir()}
    latest = next((name for name in (DETECTIONS, MODEL, "checkpoint.pt", METRICS) if name in names), None)
    return f"a cell with {latest}" if latest else "a cell without metrics"


def signal_repeatedly(
    begin: Callable[[], Any],
    out: Callable[[int], Path],
    expected: dict[str, Any],
    tries: int,
    seed: int,
    within: float,
    number: int,
) -> Tally:
    """Start a sweep, send the signal at a random moment within `within` seconds, and start it again until it is done.

    Begins a new round with a new folder until `tries` signals are sent; the last sweep runs to its end. `begin(folder)` returns
    a process (`poll`, `wait`, `pid`) that leads its group.
    """
    rng, tally = random.Random(seed), Tally()
    while tally.tries < tries:
        folder, before = out(tally.rounds), {}
        while True:
            process = begin(folder)
            if tally.tries < tries:
                _wait(process, rng.uniform(0, within))
            code = process.poll() if tally.tries < tries else process.wait()
            if code is not None:
                break
            _send_signal(process, folder, number, tally)
            before = _check_finished(folder, before, tally)
        tally.findings += [f"round {tally.rounds}: exit code {code}"] * (code != 0)
        tally.findings += [f"round {tally.rounds}: {name} differs" for name in differences(expected, contents(folder))]
        tally.rounds += 1
    return tally


def _wait(process: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)


def _send_signal(process: Any, folder: Path, number: int, tally: Tally) -> None:
    at = stage(folder)
    tally.stages[at] = tally.stages.get(at, 0) + 1
    began, began_on_disk = time.monotonic(), time.time()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
    code = process.wait()
    tally.seconds.append(round(time.monotonic() - began, 2))
    tally.tries += 1
    if tally.seconds[-1] > GRACE:  # a swallowed signal: the sweep ends later, with code 0
        tally.findings.append(f"signal {tally.tries}, {at}: exit code {code} after {tally.seconds[-1]} s")
    if number != signal.SIGKILL:
        _check_exit(code, folder, number, tally)
        marked = [f.stat().st_mtime for f in folder.glob("runs/*/*/*/*/record.json") if '"interrupted"' in f.read_text()]
        tally.marked += [round(when - began_on_disk, 2) for when in marked if when > began_on_disk]


def _check_exit(code: int, folder: Path, number: int, tally: Tally) -> None:
    """Check the exit code (the system's if the signal came before the handlers), and that no run is left as running."""
    if code not in (0, 128 + number, -number):
        tally.findings.append(f"signal {tally.tries}: exit code {code}")
    running = [f for f in Path(folder, "runs").glob("*/*/*/*/record.json") if '"status": "running"' in f.read_text()]
    tally.findings += [f"signal {tally.tries}: {file.parent} is left as running" for file in running]


def _check_finished(folder: Path, before: dict[str, str], tally: Tally) -> dict[str, str]:
    """Return the runs that are finished now. Add a finding for each that no longer is, and for a torn record."""
    try:
        now = finished(folder)
    except ValueError as error:
        tally.findings.append(f"signal {tally.tries}: a torn record ({error})")
        return before
    tally.findings += [f"signal {tally.tries}: {name} was finished" for name in before if now.get(name) != before[name]]
    return now


# ------------------------------------------------------------------------------------------------------------ the drills


def undisturbed(work: Path, extra: Sequence[str] = ()) -> tuple[dict[str, Any], float]:
    """Run a sweep without a disturbance; return its contents and its seconds."""
    begun, process = time.monotonic(), start(work, extra)
    if process.wait():
        raise SystemExit((work / "log.txt").read_text())
    return contents(work / "results"), time.monotonic() - begun


def signalled(
    options: argparse.Namespace, work: Path, number: int, tries: int, fault: str, how: str, extra: Sequence[str] = ()
) -> dict[str, Any]:
    """Send a signal to sweeps again and again, and return the outcome."""
    expected, took = undisturbed(work / "whole", extra)
    within = options.within or 0.4 * took
    tally = signal_repeatedly(
        begin=lambda out: start(out.parent, extra),
        out=lambda n: work / f"round{n}" / "results",
        expected=expected,
        tries=options.tries or tries,
        seed=options.seed,
        within=within,
        number=number,
    )
    sweep = f"a sweep of 6 runs{', by two workers of joblib' if extra else ''}"
    return outcome(f"{fault}, at a random moment of {sweep}", tally.tries, tally.findings, how) | {
        "sweeps": tally.rounds,
        "under way": dict(sorted(tally.stages.items())),
        "seconds from signal to end": {"median": sorted(tally.seconds)[len(tally.seconds) // 2], "most": max(tally.seconds)},
        **({"seconds from signal to the record that says so": {"most": max(tally.marked)}} if tally.marked else {}),
    }


EQUAL = (
    "weights, detections, metrics, records and tables of every sweep equal, to the byte, those of one that was left alone "
    "(without measured durations)"
)


def chaos(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Kill sweeps with SIGKILL."""
    how = f"{EQUAL}; what was finished stayed so; no record was torn"
    return signalled(options, work, signal.SIGKILL, 50, "SIGKILL", how)


def preempted(options: argparse.Namespace, work: Path, extra: Sequence[str] = ()) -> dict[str, Any]:
    how = f"{EQUAL}; exit code 143 within {GRACE} s, no cell left as running"
    return signalled(options, work, signal.SIGTERM, 20, "SIGTERM to the process group", how, extra)


def ctrl_c(options: argparse.Namespace, work: Path, extra: Sequence[str] = ()) -> dict[str, Any]:
    how = f"{EQUAL}; exit code 130 within {GRACE} s, no cell left as running"
    return signalled(options, work, signal.SIGINT, 20, "Ctrl-C", how, extra)


def trainings(logs: Iterable[str]) -> int:
    """Count the rows that sweeps have trained, by what they printed."""
    return sum(len(re.findall(r"seed \d+: finished in ", log)) for log in logs)


def together(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Run pairs of sweeps over the same runs at the same time."""
    (expected, _), findings, tries, trained = undisturbed(work / "whole"), [], options.tries or 3, []
    for n in range(tries):
        folders = [work / f"pair{n}" / name for name in "ab"]
        for folder in folders:
            folder.mkdir(parents=True)
            (folder / "results").symlink_to(work / f"pair{n}" / "results")
        (work / f"pair{n}" / "results").mkdir()
        with ThreadPoolExecutor(2) as pool:
            codes = list(pool.map(lambda folder: start(folder).wait(), folders))
        trained.append(trainings((folder / "log.txt").read_text() for folder in folders))
        findings += [f"pair {n}: exit codes {codes}"] * any(codes)
        findings += [f"pair {n}: {trained[-1]} trainings"] * (trained[-1] != 6)
        findings += [f"pair {n}: {name} differs" for name in differing_results(expected, work / f"pair{n}" / "results")]
    how = f"trainings of each pair of sweeps: {', '.join(map(str, trained))}; {EQUAL}"
    return outcome("two sweeps over the same 6 runs at the same time", tries, findings, how)


def worker(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Kill one of joblib's workers in the middle of a sweep."""
    (expected, took), rng, findings, tries, sweeps = undisturbed(work / "whole"), random.Random(options.seed), [], 0, 0
    while tries < (options.tries or 5):
        out = work / f"sweep{sweeps}"
        process = start(out, JOBLIB)
        _wait(process, rng.uniform(0.2, 0.8) * (options.within or took))
        workers = _children(process.pid, "LokyProcess")
        if process.poll() is None and workers:
            os.kill(rng.choice(workers), signal.SIGKILL)
            tries += 1
        code = process.wait()
        findings += [f"sweep {sweeps}: exit code {code}"] * (code != 0)
        findings += [f"sweep {sweeps}: {name} differs" for name in differing_results(expected, out / "results")]
        sweeps += 1
    how = f"the sweep went on by itself to exit code 0; {EQUAL}"
    return outcome("one of joblib's two workers is killed", tries, findings, how)


def wandb_service(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Kill wandb's service, and stop it as if it hung, in turns."""
    copies = ["log.wandb=offline"]
    (expected, took), rng, findings, tries, sweeps = undisturbed(work / "whole", copies), random.Random(options.seed), [], 0, 0
    while tries < (options.tries or 12):
        out = work / f"sweep{sweeps}"
        process = start(out, copies)
        while process.poll() is None and tries < (options.tries or 12):
            _wait(process, rng.uniform(0, 0.2) * (options.within or took))
            for service in _children(process.pid, "wandb-core"):
                with suppress(ProcessLookupError):
                    os.kill(service, (signal.SIGKILL, signal.SIGSTOP)[tries % 2])
                    tries += 1
        code = process.wait()
        findings += [f"sweep {sweeps}: exit code {code}"] * (code != 0)
        findings += [f"sweep {sweeps}: {name} differs" for name in differences(expected, contents(out / "results"))]
        sweeps += 1
    how = f"{sweeps} sweep{'s' * (sweeps != 1)} went on to exit code 0; {EQUAL}"
    return outcome("wandb's service is killed or hangs (SIGKILL and SIGSTOP in turns)", tries, findings, how)


def _children(parent: int, name: str) -> list[int]:
    """Return the ids of the processes of this name that a sweep has started."""
    pgrep = subprocess.run(["pgrep", "-P", str(parent), "-f", name], capture_output=True, text=True)
    return [int(line) for line in pgrep.stdout.split()]


def outcome(fault: str, tries: int, findings: Sequence[str], how: str) -> dict[str, Any]:
    """Return the outcome of a drill as reliability.py reads it."""
    return {"fault": fault, "tries": tries, "lost": len(findings), "how": how, "findings": list(findings)}


DRILLS = {
    "chaos": chaos,
    "preempted": preempted,
    "ctrl-c": ctrl_c,
    "together": together,
    "worker": worker,
    "wandb": wandb_service,
}
DRILLS |= {f"{name}-joblib": partial(DRILLS[name], extra=JOBLIB) for name in ("preempted", "ctrl-c")}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a drill and save its outcome; return 0 if nothing was lost."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drill", choices=DRILLS)
    parser.add_argument("--tries", type=int, default=0, help="how often the fault strikes (default: the drill's own)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument(
        "--within", type=float, help="seconds after a start within which the fault strikes (default: 0.4 of a sweep)"
    )
    parser.add_argument("--json", type=Path, help="default: results/reference/reliability/<drill>.json")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for background jobs
    with tempfile.TemporaryDirectory() as work:
        result = DRILLS[options.drill](options, Path(work))
    file = options.json or OUTCOMES / f"{options.drill}.json"
    print(save(file, f"python scripts/drills/kills.py {shlex.join(arguments)}", result))
    return int(result["lost"] > 0)


if __name__ == "__main__":
    sys.exit(main())

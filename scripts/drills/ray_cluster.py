"""Interrupt and kill sweeps over Ray, on this machine and on a cluster, and compare their results with those of a local sweep.

    python scripts/drills/ray_cluster.py own|cluster

A sweep of 6 rows x 2 seeds gets Ctrl-C, is started again, and loses a worker to SIGKILL: with a Ray of its own, or on a cluster
that runs already, in another folder and without the sweep's environment. Needs pip install "fpn-ablate[ray]".
Writes results/reference/reliability/ray-<drill>.json.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from kills import EQUAL, _children, contents, finished, outcome
from reliability import OUTCOMES, save

ROWS = ["ablation=c4,c5,fpn,bottom_up,no_lateral,finest", "seed=0,1"]
COMMAND = ["-m", *ROWS, "recipe=smoke", "device=cpu", "threads=1", "log.wandb=disabled"]
ADDRESS, CLIENT_PORT = "127.0.0.1:6399", "9990"
# Ray 2.60 asks for a token on clusters; this one listens on the loopback interface alone.
ENVIRONMENT = {
    "FPN_ABLATE_PAGE": "off",
    "OMP_NUM_THREADS": "1",
    "RAY_AUTH_MODE": "disabled",
    "RAY_raylet_start_wait_time_s": "300",
}
PATIENCE = 1800  # seconds; a loaded machine is slow
RAY = "hydra/launcher=ray"


def start(folder: Path, extra: Sequence[str]) -> subprocess.Popen:
    """Start the sweep in a process group of its own; `out` is a relative path."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("a") as log:
        command = [sys.executable, "-m", "fpn_ablate", *COMMAND, *extra, "out=results"]
        environment = os.environ | ENVIRONMENT
        return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=environment, start_new_session=True)


@contextmanager
def cluster(work: Path) -> Iterator[int]:
    """Start a cluster of one node with two processors in a folder of its own; yield the process that its raylet belongs to."""
    ray = {name: value for name, value in ENVIRONMENT.items() if name.startswith("RAY_")}
    clean = {name: os.environ[name] for name in ("HOME", "PATH")} | ray
    options = ["--node-ip-address=127.0.0.1", f"--port={ADDRESS.split(':')[1]}", f"--ray-client-server-port={CLIENT_PORT}"]
    command = ["ray", "start", "--head", "--block", *options, "--num-cpus=2", "--include-dashboard=false"]
    with (work / "cluster.txt").open("w") as log:
        process = subprocess.Popen(
            [*command, f"--temp-dir={work}"], cwd=work, env=clean, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_for(lambda: "Ray runtime started" in (work / "cluster.txt").read_text())
        yield process.pid
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def wait_for(condition) -> None:
    """Wait until `condition()` is true."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise SystemExit("the drill waited in vain")
        time.sleep(0.05)


def disturb(folder: Path, extra: Sequence[str], ray_parent: int | None = None) -> list[str]:
    """Interrupt a sweep, start it again and kill one of its workers; return the findings.

    `ray_parent`: the process that Ray belongs to; the sweep's own by default.
    """
    findings, results = [], folder / "results"
    process = start(folder, extra)
    wait_for(lambda: len(finished(results)) >= 2)
    os.killpg(process.pid, signal.SIGINT)
    code = process.wait()
    findings += [f"{folder.name}: exit code {code} after Ctrl-C"] * (code != 130)
    records = list(results.glob("runs/*/*/*/*/record.json"))
    findings += [f"{folder.name}: {file.parent.name} is left as running" for file in records if '"running"' in file.read_text()]
    before = len(finished(results))
    process = start(folder, extra)
    wait_for(lambda: len(finished(results)) >= before + 2)
    workers: list[int] = []
    while not workers:
        workers = [w for raylet in _children(ray_parent or process.pid, "raylet") for w in _children(raylet, "ray::_run_in")]
    os.kill(workers[0], signal.SIGKILL)
    code = process.wait()
    return findings + [f"{folder.name}: exit code {code} after a worker was killed"] * (code != 0)


def own(work: Path) -> list[str]:
    return disturb(work / "own", [RAY, "hydra.launcher.ray.init.address=local", "+hydra.launcher.ray.init.num_cpus=2"])


def existing(work: Path) -> list[str]:
    with cluster(work) as parent:
        findings = disturb(work / "cluster", [RAY, f"hydra.launcher.ray.init.address={ADDRESS}"], parent)
        client = [RAY, f"hydra.launcher.ray.init.address=ray://127.0.0.1:{CLIENT_PORT}", "ablation=c4"]
        code = start(work / "client", client).wait()
        return findings + [f"client: exit code {code}"] * (code != 0)


def compare(expected: dict, folder: Path) -> list[str]:
    """List what differs from a local sweep's results."""
    if not finished(folder / "results"):
        raise SystemExit((folder / "log.txt").read_text())
    found = contents(folder / "results")
    # The tables of one row are others.
    parts = [part for part in found if part.startswith("runs/")] if folder.name == "client" else expected.keys() | found.keys()
    return [f"{folder.name}: {part} differs" for part in sorted(parts) if expected.get(part) != found.get(part)]


DRILLS = {  # function, folders of results, how
    "own": (own, ["own"], "by a Ray of the sweep's own"),
    "cluster": (existing, ["cluster", "client"], "by a cluster that runs already; 1 row x 2 seeds (undisturbed) by ray://"),
}


def main() -> int:
    """Run a drill and save its outcome; return 0 if nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drill", choices=DRILLS)
    parser.add_argument("--local", type=Path, help="results of the local sweep, made before (default: run it)")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for background jobs
    run, folders, where = DRILLS[options.drill]
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        if not options.local and start(work / "local", ["jobs=2"]).wait():
            raise SystemExit((work / "local" / "log.txt").read_text())
        expected = contents(options.local or work / "local" / "results")
        findings = run(work)
        findings += [finding for name in folders for finding in compare(expected, work / name)]
        if findings:
            print(*((work / name / "log.txt").read_text() for name in folders), sep="\n", file=sys.stderr)
    how = f"6 rows x 2 seeds {where}; exit code 130 after Ctrl-C, then 0; {EQUAL}"
    result = outcome(f"Ctrl-C, then SIGKILL to a worker, of a sweep over Ray ({options.drill})", 2, findings, how)
    print(save(OUTCOMES / f"ray-{options.drill}.json", f"python scripts/drills/ray_cluster.py {options.drill}", result))
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main())

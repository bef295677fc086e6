"""Kill, preempt and time out jobs of a sweep on SLURM, and the sweep's own process, and compare what is left.

    scripts/drills/slurm_host.sh start FOLDER; export SLURM_CONF=FOLDER/slurm.conf
    python scripts/drills/slurm.py

A sweep of 6 rows at 2 seeds, of Table 1 and of Table 2, whose rows stand on the RPN of one. While it trains, one job is
preempted by a job of the partition `urgent`, one is killed (SIGKILL), one reaches its limit, and the sweep's own process is
killed.
The same command is then started until it ends well. Its results must equal those of a sweep on this machine without SLURM.
The outcome goes to results/reference/reliability/slurm.json.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import kills
from reliability import OUTCOMES, save

from fpn_ablate.utils.paths import METRICS

CELLS = [*kills.CELLS, "seed=0,1", "recipe.steps=300", "log.wandb=disabled"]  # SLURM takes seconds to preempt a job
SLURM = ["hydra/launcher=slurm", "hydra.launcher.timeout_min=15", "hydra.launcher.signal_delay_s=30"]
SWEEPS = 4  # at most, after the one whose process is killed
PATIENCE = 900  # seconds for which a job to be disturbed is waited for


def start(out: Path, *extra: str) -> subprocess.Popen:
    """Start the sweep in a process group of its own, writing below `out`."""
    out.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"FPN_ABLATE_PAGE": "off", "OMP_NUM_THREADS": "1"}
    with (out / "log.txt").open("a") as log:
        command = [sys.executable, "-m", "fpn_ablate", *CELLS, *extra, "out=results"]
        return subprocess.Popen(command, cwd=out, stdout=log, stderr=log, env=environment, start_new_session=True)


def running_jobs() -> dict[str, str]:
    """Return id -> name of the running jobs of rows."""
    answer = subprocess.run(["squeue", "--noheader", "--states=RUNNING", "--format=%i|%j"], capture_output=True, text=True)
    jobs = dict(line.split("|", 1) for line in answer.stdout.split())
    return {number: name for number, name in jobs.items() if "-seed" in name and not name.startswith("sources")}


def training_job(out: Path, but: set[str]) -> str:
    """Wait for a running job, none of `but`, that has trained some steps, and return its id."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if number := next(filter(has_trained_steps, running_jobs().keys() - but), None):
            return number
        time.sleep(0.5)
    raise SystemExit(f"no job trains: {(out / 'log.txt').read_text()}")


def has_trained_steps(number: str) -> bool:
    """Return whether the process of a job has logged a step."""
    with suppress(OSError):
        opened = [file.resolve() for file in Path(f"/proc/{process_of(number)}/fd").iterdir()]
        return any(file.name == METRICS and file.stat().st_size for file in opened)
    return False


def process_of(number: str) -> int:
    """Return the id of the process that trains the row of a job.

    Raises:
        ProcessLookupError: there is none.
    """
    array, _, index = number.partition("_")
    wanted = {f"SLURM_ARRAY_JOB_ID={array}".encode(), f"SLURM_ARRAY_TASK_ID={index}".encode()}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            environment, command = ((folder / name).read_bytes().split(b"\0") for name in ("environ", "cmdline"))
            if wanted <= set(environment) and b"submitit.core._submit" in command and b"srun" not in command[0]:
                return int(folder.name)
    raise ProcessLookupError(f"job {number} has no process")


def kill(number: str) -> None:
    """Send SIGKILL to the process of a job, as the kernel does for want of memory."""
    os.kill(process_of(number), signal.SIGKILL)


def preempt(number: str) -> None:
    """Let a job of a partition of higher priority take a GPU. SLURM chooses whose."""
    subprocess.run(["sbatch", "--partition=urgent", "--gpus=1", "--wrap", "sleep 5"], check=True, cwd=tempfile.gettempdir())


def reach_limit(number: str) -> None:
    """Let a job reach a limit that comes soon: its process stands still until SLURM has sent the signal before the limit."""
    process = process_of(number)
    os.kill(process, signal.SIGSTOP)
    elapsed = subprocess.run(["squeue", "--noheader", f"--jobs={number}", "--format=%M"], capture_output=True, text=True).stdout
    limit = int(elapsed.strip().split(":")[-2]) + 2
    subprocess.run(["scontrol", "update", f"JobId={number}", f"TimeLimit={limit}"], check=True)
    pending = re.compile(r"ShdPnd:\s*(\w+)")
    with suppress(FileNotFoundError, ProcessLookupError):  # SLURM lets it go on as well
        while not int(pending.search(Path(f"/proc/{process}/status").read_text())[1], 16) >> signal.SIGUSR2 - 1 & 1:
            time.sleep(0.2)
        os.kill(process, signal.SIGCONT)


def disturb(out: Path, process: subprocess.Popen) -> dict[str, str]:
    """Disturb three jobs, and the sweep's own process while the last of them is requeued; return fault -> job."""
    faults: dict[str, Callable[[str], None]] = {"preempted": preempt, "killed": kill, "past its limit": reach_limit}
    struck: dict[str, str] = {}
    for fault, strike in faults.items():
        number = training_job(out, set(struck.values()))
        strike(number)
        struck[fault] = number
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return struck


def check_logs(out: Path, struck: dict[str, str]) -> list[str]:
    """Check that the job was killed, and that two jobs at least were requeued."""
    logs = {file.parent.name: file.read_text() for file in out.glob("results/slurm/*/*_0_log.out")}
    requeued = [number for number, text in logs.items() if "Requeued job" in text]
    findings = [] if len(requeued) >= 2 else [f"requeued: {requeued}"]
    killed = struck["killed"]
    return findings + ([] if "Killed" in logs[killed] else [f"{killed} was not killed"])


def main() -> int:
    """Run the drill and save its outcome; return 0 if nothing was lost."""
    with tempfile.TemporaryDirectory() as work:
        local, out = Path(work, "local"), Path(work, "slurm")
        undisturbed, began = start(local, "jobs=2"), time.monotonic()
        struck, codes = disturb(out, start(out, *SLURM)), []
        while (not codes or codes[-1]) and len(codes) < SWEEPS:
            codes.append(start(out, *SLURM).wait())
        seconds = round(time.monotonic() - began)
        if undisturbed.wait():
            raise SystemExit((local / "log.txt").read_text())
        expected = kills.contents(local / "results")
        trained = len(list(local.glob("results/runs/*/*/*/*/record.json")))
        findings = [f"{name} differs" for name in kills.differences(expected, kills.contents(out / "results"))]
        findings += check_logs(out, struck) + [f"exit codes {codes}"] * bool(codes[-1])
        resumed = [json.loads(file.read_text())["cost"]["resumed_at"] for file in out.glob("results/runs/*/*/*/*/record.json")]
        log = (out / "log.txt").read_text()
    how = f"{kills.EQUAL} on the same machine without SLURM; exit codes of the same command again: {', '.join(map(str, codes))}"
    fault = (
        f"SLURM, {trained} runs on two GPUs: a job killed, one preempted, one past its limit, the sweep's own process killed"
    )
    outcome = kills.outcome(fault, 4, findings, how) | {
        "struck": struck,
        "resumed at step": sorted(filter(None, resumed)),
        "jobs of an earlier command that were waited for": log.count("of an earlier command"),
        "seconds": seconds,
    }
    command = f"scripts/drills/slurm_host.sh start FOLDER; python {shlex.join(['scripts/drills/slurm.py'])}"
    print(save(OUTCOMES / "slurm.json", command, outcome))
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main())

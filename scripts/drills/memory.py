"""Check that memory, open files and logs stay bounded in a long training and in a long sweep.

    python scripts/drills/memory.py steps    train a tiny row for 20,000 steps
    python scripts/drills/memory.py jobs     run a sweep of 200 tiny runs

Both call the command line's `main` in this process and write their outcome to results/reference/reliability/. Linux only, on a
CPU, some minutes each. Exit code 1: memory grew, or something was lost.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

from reliability import OUTCOMES, save

from fpn_ablate.cli.main import main as fpn_ablate
from fpn_ablate.cli.parser import at_least
from fpn_ablate.report.html import live
from fpn_ablate.runs import run as running
from fpn_ablate.utils.paths import METRICS, RECORD

# As small as a run can be: tensor sizes do not matter here.
TINY = (
    *("recipe=smoke", "device=cpu", "threads=1", "backbone.weights=none", "backbone.freeze_at=0", "backbone.frozen_bn=false"),
    *("recipe.short_side=32", "recipe.max_side=64", "recipe.channels=8", "recipe.batch_size=2", "rpn.samples=16"),
    *("recipe.eval_images=2", "data.train_images=4", "data.val_images=2"),
)
WARMUP = 0.1  # share of samples dropped at the beginning, while pictures are rendered and caches fill
ALLOWED = 8.0  # MiB between the medians of the second and the last tenth: the allocator's pages come and go


@dataclass
class Gauge:
    """Samples of what this process uses after a number of steps or jobs."""

    counts: list[int] = field(default_factory=list)
    rss: list[float] = field(default_factory=list)  # MiB
    files: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)

    def read(self, count: int) -> None:
        """Take a sample after `count` steps or jobs."""
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        self.counts.append(count)
        self.rss.append(int(status["VmRSS"].split()[0]) / 1024)
        self.files.append(len(os.listdir("/proc/self/fd")))
        self.threads.append(int(status["Threads"]))

    def summary(self) -> dict[str, float | int]:
        """Return medians of tenths of the samples after the warm-up, and the slope of a line through them (least squares)."""
        first = int(WARMUP * len(self.rss))
        counts, rss = self.counts[first:], self.rss[first:]
        tenth = max(1, len(rss) // 10)
        begin, end = statistics.median(rss[:tenth]), statistics.median(rss[-tenth:])
        slope = statistics.linear_regression(counts, rss).slope
        return {
            "samples": len(rss),
            "rss_mib_second_tenth": round(begin, 1),
            "rss_mib_last_tenth": round(end, 1),
            "grew_mib": round(end - begin, 1),
            "kib_each": round(1024 * slope, 3),
            "open_files": [self.files[first], self.files[-1]],
            "threads": [self.threads[first], self.threads[-1]],
        }

    def is_constant(self) -> bool:
        """Tell whether neither memory nor the number of open files grew."""
        return self.summary()["grew_mib"] <= ALLOWED and self.files[-1] <= self.files[len(self.files) // 10]


def steps(count: int, out: Path) -> dict:
    """Train one row for `count` steps, with checkpoints, metrics and an offline copy for wandb."""
    gauge, log = Gauge(), running.Run.log

    def logged(self: running.Run, step: int, values: dict[str, float]) -> None:
        log(self, step, values)
        gauge.read(step)

    arguments = [*TINY, f"recipe.steps={count}", f"recipe.checkpoint_every={max(1, count // 40)}", f"out={out}"]
    running.Run.log = logged
    console = out / "console.log"
    with console.open("w") as stream, redirect_stderr(stream):
        code, took = _timed(lambda: fpn_ablate(arguments))
    running.Run.log = log
    (file,) = out.rglob(RECORD)
    record, folder = json.loads(file.read_text()), file.parent
    sizes = {
        "metrics.jsonl": (folder / METRICS).stat().st_size,
        "wandb, offline": sum(file.stat().st_size for file in (folder / "wandb").rglob("*") if file.is_file()),
        "console in a file": console.stat().st_size,
        "hydra": sum(file.stat().st_size for file in out.rglob("*.log") if file.parent == out / "runs"),
    }
    lost = int(record["status"] != "finished" or code != 0) or int(not gauge.is_constant())
    return {
        "fault": f"{count:,} training steps in one process",
        "tries": 1,
        "lost": lost,
        "how": f"resident memory after every {record['config']['log']['every']}th step, the first tenth thrown away",
        "steps": count,
        "seconds": round(took, 1),
        **gauge.summary(),
        "log_every": record["config"]["log"]["every"],
        "log_bytes": sizes,
        "log_bytes_a_step": {name: round(size / count, 2) for name, size in sizes.items()},
    }


def jobs(count: int, out: Path) -> dict:
    """Run a sweep of `count` runs, rows and seeds mixed, one after the other in this process, as Hydra's own launcher does."""
    gauge, run, peaks = Gauge(), running.run, []

    def measured(*arguments: object) -> dict:
        outcome = run(*arguments)
        gauge.read(len(gauge.counts) + 1)
        peaks.append((outcome["row"], outcome["cost"]["peak_memory_mib"]))
        return outcome

    rows = ["c4", "fpn", "bottom_up", "finest"]
    seeds = -(-count // len(rows))
    sweep = [f"seed=range({seeds})", f"ablation={','.join(rows)}"]  # in this order rows alternate, not seeds
    arguments = ["-m", *TINY, *sweep, "jobs=1", "log.wandb=disabled", f"out={out}"]
    running.run = measured
    code, took = _timed(lambda: fpn_ablate(arguments))
    running.run = run
    states = [json.loads(file.read_text())["status"] for file in out.rglob(RECORD)]
    half = len(peaks) // 2
    drift = {
        row: [statistics.median(peak for name, peak in part if name == row) for part in (peaks[len(rows) : half], peaks[half:])]
        for row in rows
    }
    lost = len(rows) * seeds - states.count("finished") + int(code != 0) + int(not gauge.is_constant())
    return {
        "fault": f"{len(states)} jobs in one process",
        "tries": len(states),
        "lost": lost,
        "how": "resident memory after every job of one sweep, the first tenth thrown away",
        "seconds": round(took, 1),
        **gauge.summary(),
        "peak_mib_first_and_second_half": drift,
        "log_bytes_a_job": round(sum(file.stat().st_size for file in out.rglob("*.log")) / len(states)),
    }


def _timed(work: Callable[[], int]) -> tuple[int, float]:
    """Return exit code and seconds. `sys.argv` is set as in a shell, since Hydra reads it."""
    sys.argv, began = ["fpn_ablate"], time.monotonic()
    try:
        with open(os.devnull, "w") as devnull, redirect_stdout(devnull):  # drops the tables
            code = work()
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, time.monotonic() - began


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python scripts/drills/memory.py", description=__doc__.splitlines()[0])
    parser.add_argument("drill", choices=["steps", "jobs"])
    parser.add_argument("--count", type=at_least(16), help="steps (default 20000) or jobs (default 200), 16 or more")
    parser.add_argument("--out", type=Path, default=OUTCOMES, help="default: results/reference/reliability")
    options = parser.parse_args(argv)
    os.environ.setdefault(live.SWITCH, "off")  # the page takes another process and seconds
    drill, default = {"steps": (steps, 20_000), "jobs": (jobs, 200)}[options.drill]
    with tempfile.TemporaryDirectory() as scratch:
        outcome = drill(options.count or default, Path(scratch))
    file = options.out / f"memory_{options.drill}.json"
    print(save(file, f"python scripts/drills/memory.py {options.drill}", outcome), end="")
    return int(outcome["lost"] > 0)


if __name__ == "__main__":
    sys.exit(main())

"""Kill a search with Optuna, start it again, and compare it with one that was left alone.

    python scripts/drills/search.py

A search of 6 trials over a rate and a list, with two seeds, gets SIGKILL after the first two trials. The same command must then
find the finished runs again and propose the same trials. Needs pip install "fpn-ablate[optuna]".
Writes results/reference/reliability/search.json.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kills import EQUAL, contents, differences, finished, outcome
from reliability import OUTCOMES, save

COMMAND = [
    *("-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=6", "recipe.optimizer.lr=tag(log,interval(1e-4,1e-1))"),
    *("neck.upsample=nearest,bilinear", "recipe=smoke", "seed=0,1", "device=cpu", "threads=1", "log.wandb=disabled"),
]
RUNS = 12  # trials times seeds


def start(folder: Path) -> subprocess.Popen:
    """Start the search in a process group of its own."""
    folder.mkdir(exist_ok=True)
    with (folder / "log.txt").open("w") as log:
        environment = os.environ | {"FPN_ABLATE_PAGE": "off"}
        command = [sys.executable, "-m", "fpn_ablate", *COMMAND]
        return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=environment, start_new_session=True)


def main() -> int:
    """Run the drill and save its outcome; return 0 if nothing was lost."""
    with tempfile.TemporaryDirectory() as temporary:
        whole, killed = Path(temporary, "whole"), Path(temporary, "killed")
        findings = [f"exit code {code}" for code in [start(whole).wait()] if code]
        process = start(killed)
        while process.poll() is None and len(finished(killed / "results")) < 4:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        findings += [f"exit code {code} after SIGKILL" for code in [start(killed).wait()] if code]
        results = [folder / "results" for folder in (whole, killed)]
        findings += [f"{name} differs" for name in differences(*map(contents, results))]
        findings += [f"{len(finished(folder))} runs" for folder in results if len(finished(folder)) != RUNS]
        shown = [(folder / "log.txt").read_text().partition("The best of")[2] for folder in (whole, killed)]
        findings += ["other trials are shown"] * (shown[0] != shown[1])
        print("The best of" + shown[0])
    how = f"the same command finds the finished runs and shows the same trials; {EQUAL}"
    result = outcome("SIGKILL to a search with Optuna (6 trials x 2 seeds)", 1, findings, how)
    print(save(OUTCOMES / "search.json", "python scripts/drills/search.py", result))
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main())

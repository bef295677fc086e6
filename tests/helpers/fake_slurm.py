"""Stand in for SLURM's commands: `python fake_slurm.py sbatch|srun|squeue|scontrol ...`; the jobs lie in $FAKE_SLURM.

A job's process gets none of its parent's environment, as with `sbatch --export=NONE`. While a file `hold` lies in the folder,
jobs wait, and tests write their states.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

JOBS = Path(os.environ.get("FAKE_SLURM", "."))


def install(folder: Path, refuse: str = "") -> Path:
    """Write the commands into `folder`/bin, and return that folder. `refuse`: what sbatch says in place of taking a job."""
    for name in ("sbatch", "srun", "squeue", "scontrol"):
        command = folder / "bin" / name
        command.parent.mkdir(exist_ok=True)
        line = (
            f'echo "{refuse}" >&2; exit 1'
            if refuse and name == "sbatch"
            else f'exec "{sys.executable}" -IS "{__file__}" {name} "$@"'
        )
        command.write_text(f"#!/bin/sh\n{line}\n")
        command.chmod(0o755)
    return folder / "bin"


def sbatch(script: str) -> None:
    text = Path(script).read_text()
    number = len([*JOBS.glob("*.sh")]) + 1
    (JOBS / f"{number}.sh").write_text(text)
    last = re.search(r"--array=0-(\d+)", text)
    for job in [f"{number}_{index}" for index in range(int(last[1]) + 1)] if last else [str(number)]:
        (JOBS / f"{job}.name").write_text(re.search(r"--job-name=(\S+)", text)[1])
        (JOBS / f"{job}.state").write_text("PENDING")
        if not (JOBS / "hold").exists():
            environment = {name: os.environ[name] for name in ("PATH", "FAKE_SLURM")}
            subprocess.Popen([sys.executable, __file__, "task", job], env=environment, stdout=-3, stderr=-3)  # DEVNULL
    print(f"Submitted batch job {number}")


def task(job: str) -> None:
    """Run a job, again as often as it is requeued."""
    number, _, index = job.partition("_")
    environment = {"SLURM_JOB_ID": job} | ({"SLURM_ARRAY_JOB_ID": number, "SLURM_ARRAY_TASK_ID": index} if index else {})
    while True:
        (JOBS / f"{job}.state").write_text("RUNNING")
        code = subprocess.run(["bash", JOBS / f"{number}.sh"], env=os.environ | environment).returncode
        if not (JOBS / f"{job}.requeue").exists():
            (JOBS / f"{job}.state").write_text("FAILED" if code else "COMPLETED")
            return
        (JOBS / f"{job}.requeue").unlink()


def srun(*arguments: str) -> None:
    output = arguments[arguments.index("--output") + 1]
    number, _, index = os.environ["SLURM_JOB_ID"].partition("_")
    for pattern, value in {"%A": number, "%a": index, "%j": number, "%t": "0"}.items():
        output = output.replace(pattern, value)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    with open(output, "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        os.execvp("sh", arguments[arguments.index("sh") :])


def squeue(*options: str) -> None:
    chosen = [option.removeprefix("--jobs=") for option in options if option.startswith("--jobs=")]
    for file in JOBS.glob("*.state"):
        if file.stem in (chosen or [file.stem]):
            print(f"{file.stem}|{file.read_text()}|{file.with_suffix('.name').read_text()}")


def scontrol(action: str, *arguments: str) -> None:
    if action == "requeue":
        (JOBS / f"{arguments[0]}.requeue").touch()
    else:
        values = dict(argument.split("=", 1) for argument in arguments)
        (JOBS / f"{values['JobId']}.name").write_text(values["JobName"])


if __name__ == "__main__":
    {function.__name__: function for function in (sbatch, task, srun, squeue, scontrol)}[sys.argv[1]](*sys.argv[2:])

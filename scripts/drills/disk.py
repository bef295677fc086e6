"""Run a small sweep on disks that are really full or read-only (tmpfs mounts), and again once there is room.

    python scripts/drills/disk.py [disk_full] [read_only] [around]    as root on Linux, since it mounts; default: all three

disk_full runs two rows of recipe=smoke on disks of thirteen sizes, so that the disk fills at another moment each time, then
makes room and repeats the command. read_only does the same with a results folder that is read-only at first. around tries a
full disk below TMPDIR, a HOME that is read-only or missing, and output to a full disk. A sweep whose results differ from those
of an undisturbed one counts as `lost`. Takes about 15 minutes on two cores, and the package must not change meanwhile. Writes
results/reference/reliability/.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from kills import contents, differences
from reliability import OUTCOMES, save

from fpn_ablate.report.html import live
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.paths import RECORD

ROWS = ("c4", "fpn")
SETTINGS = ("recipe=smoke", "backbone.weights=pretrain", "threads=1", "jobs=1", "device=cpu")
ARGUMENTS = ("-m", f"ablation={','.join(ROWS)}", *SETTINGS)
# KiB. Without a backbone the disk is full at once, after the plan, or in pre-training. With one (2.7 MiB) it is full at the
# first checkpoint, at a later one, or after the first row. Checkpoints are the largest files, so they hit the limit first;
# tests/project/test_disk.py covers the other files.
WITHOUT_BACKBONE = (16, 80, 1500)
WITH_BACKBONE = (2900, 3600, 4800, 6500, 7000, 7200, 7500, 8400, 9200, 10400)
ROOM = "64m"


def run(out: Path, **changes: str | None) -> tuple[int, str]:
    """Run the sweep and return its exit code and output; `changes` to the environment, None removes a variable."""
    # wandb's service and the live page are other processes. tests/tracking/test_wandb.py fills the disk of the copy.
    merged = os.environ | {"WANDB_MODE": "disabled", live.SWITCH: "off"} | changes
    variables = {name: value for name, value in merged.items() if value is not None}
    command = [sys.executable, "-m", "fpn_ablate", *ARGUMENTS, f"out={out}"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout + done.stderr


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def problems(undisturbed: dict[str, object], out: Path, code: int) -> list[str]:
    """List how the results differ from those of an undisturbed sweep."""
    try:
        differing = [f"{name} differs" for name in differences(undisturbed, contents(out))]
    except (UserError, OSError, ValueError, KeyError) as error:
        differing = [f"not complete ({error})"]
    return [*([f"exit code {code}"] if code else []), *differing]


def message_problems(text: str, fix: str = "make room") -> list[str]:
    """List what is wrong with the output about a fault: a traceback, or no line with the path and the fix."""
    lines = [line for line in text.splitlines() if "cannot be written" in line and fix in line and "/" in line]
    return [*([] if lines else ["no line names the place and the fix"]), *(["a traceback"] if "Traceback" in text else [])]


def finished(out: Path) -> set[str]:
    """Return the rows that are finished."""
    records = [json.loads(file.read_text()) for file in out.glob(f"runs/*/*/*/*/{RECORD}")]
    return {record["row"] for record in records if record["status"] == "finished"}


def disk_full(undisturbed: dict[str, object], scratch: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield each try with its findings: a disk too small for the sweep, and the same command with enough room."""
    for size in (*WITHOUT_BACKBONE, *WITH_BACKBONE):
        with mounted(scratch / f"full{size}", f"{size}k") as disk:
            out = disk / "results"
            if size in WITH_BACKBONE:
                shutil.copytree(scratch / "undisturbed" / "backbones", out / "backbones")
            code, text = run(out)
            states, finished_rows = sorted(re.findall(r'"status": "(\w+)"', "".join(_texts(out)))), finished(out)
            findings = [*message_problems(text), *([] if code else ["exit code 0"])]
            struck = sorted({Path(match).name for match in re.findall(r"(\S+): cannot be written", text)})
            remount(disk, f"size={ROOM}")
            code, text = run(out)
            repeated = [row for row in finished_rows if f"{row} seed 0: finished before" not in text]
            findings += [*(f"{row} was done twice" for row in repeated), *problems(undisturbed, out, code)]
            yield f"{size} KiB: struck {', '.join(struck)}; records {', '.join(states) or 'none'}", findings


def _texts(out: Path) -> list[str]:
    return [file.read_text() for file in out.glob(f"runs/*/*/*/*/{RECORD}")]


def read_only(undisturbed: dict[str, object], scratch: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield each try with its findings: a read-only folder before and after the sweep, and its tables written elsewhere."""
    with mounted(scratch / "read_only", ROOM) as disk:
        out = disk / "results"
        remount(disk, "ro")
        code, text = run(out)
        findings = [*message_problems(text, "make it writable"), *([] if code else ["exit code 0"])]
        remount(disk, "rw")
        code, _ = run(out)
        yield "an empty folder", [*findings, *problems(undisturbed, out, code)]
        remount(disk, "ro")
        code, text = run(out)
        findings = [*message_problems(text, "make it writable"), *([] if code else ["exit 0"])]
        yield "a finished sweep", [*findings, *problems(undisturbed, out, 0)]
        command = [sys.executable, "-m", "fpn_ablate", "report", str(out / "runs"), "--out", str(scratch / "elsewhere")]
        code = subprocess.run(command, capture_output=True, text=True).returncode
        here, there = ({f.name: f.read_text() for f in (of / "tables").iterdir()} for of in (out, scratch / "elsewhere"))
        findings = [*differences(here, there), *([] if here else ["no tables"])]
        yield "its tables, written elsewhere", [*findings, *([f"exit code {code}"] if code else [])]


def around(undisturbed: dict[str, object], scratch: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield each try with its findings: full, read-only or missing places that a run must not depend on."""
    with mounted(scratch / "tmp", "64k") as tmp, mounted(scratch / "home", "64k") as home:
        (tmp / "filler").write_bytes(bytes(64 * 1024))
        remount(home, "ro")
        homes = dict.fromkeys(("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR", "WANDB_DIR", "TORCH_HOME"))
        places = {
            "TMPDIR on a full disk": {"TMPDIR": str(tmp)},
            "HOME read-only": {"HOME": str(home), **homes},
            "HOME not there": {"HOME": "/nowhere", **homes},
            "HOME not set": {"HOME": None, **homes},
            "HOME read-only and TMPDIR full": {"HOME": str(home), "TMPDIR": str(tmp), **homes},
        }
        for number, (name, changes) in enumerate(places.items()):
            out = scratch / f"around{number}"
            code, text = run(out, **changes)
            notes = [line[:150] for line in text.splitlines() if line.startswith("warning") or "no copy" in line]
            yield f"{name}{': ' if notes else ''}{'; '.join(notes)}", problems(undisturbed, out, code)
    out = scratch / "output"
    command = [sys.executable, "-m", "fpn_ablate", *ARGUMENTS, f"out={out}"]
    with open("/dev/full", "w") as full:
        code = subprocess.run(command, stdout=full, stderr=full).returncode
    yield f"output to a full disk (exit code {code})", problems(undisturbed, out, 0 if code else 1)


SAME = "gives the weights, metrics, detections and tables of a sweep left alone"
# name -> fault, how it is checked, the function that tries it
DRILLS: dict[str, tuple[str, str, Callable]] = {
    "disk_full": ("disk full (ENOSPC)", f"the same command, once there is room, {SAME}", disk_full),
    "read_only": ("read-only results folder (EROFS)", f"the same command, once it is writable, {SAME}", read_only),
    "around": ("HOME, TMPDIR or the terminal's disk full, read-only or missing", f"a sweep there {SAME}", around),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python scripts/drills/disk.py", description=__doc__.splitlines()[0])
    parser.add_argument("drills", nargs="*", metavar="DRILL", help=f"of {', '.join(DRILLS)} (default: all)")
    parser.add_argument("--out", type=Path, default=OUTCOMES, help="default: results/reference/reliability")
    options = parser.parse_args(argv)
    lost = 0
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        code, text = run(scratch / "undisturbed")
        if code:
            print(text)
            return 2
        undisturbed = contents(scratch / "undisturbed")
        for name in options.drills or DRILLS:
            tries: list[dict] = []
            fault, how, attempts = DRILLS[name]
            for title, findings in attempts(undisturbed, scratch):
                print(f"{name}: {title}: {'; '.join(findings) or 'nothing lost'}", flush=True)
                tries.append({"try": title, "findings": findings})
                bad = sum(bool(attempt["findings"]) for attempt in tries)
                outcome = {"fault": fault, "tries": len(tries), "lost": bad, "how": how, "each": tries}
                save(options.out / f"{name}.json", f"python scripts/drills/disk.py {name}", outcome)
            lost += bad
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())

"""Disks that are full or read-only, for real: a small sweep on small tmpfs mounts, started again once there is room.

`python scripts/drills/disk.py` (as root on Linux: it mounts) runs two rows of recipe=smoke on disks of thirteen sizes, so that
it is full at another moment each time, then makes room and gives the same command again; and the same for a results folder that
is read-only at first, for a full disk below TMPDIR, for a HOME that is read-only or not there, and for an output that goes to a
full disk. What ends otherwise than a run that nothing disturbs is `lost`. Some 15 minutes on two cores; writes
results/reference/reliability/. The package must not change meanwhile.
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

import numpy as np
import torch

from fpn_ablate.report.html import live
from fpn_ablate.runs.environment import machine
from fpn_ablate.utils.files import save_text
from fpn_ablate.utils.paths import DETECTIONS, MODEL, RECORD

OUT = Path(__file__).resolve().parents[2] / "results" / "reference" / "reliability"
ROWS = ("c4", "fpn")
ARGUMENTS = ("-m", "recipe=smoke", f"ablation={','.join(ROWS)}", "threads=1", "device=cpu")
# In KiB. First without a backbone: no room at all; for a plan; in pre-training. Then with one (2.7 MiB): in a first checkpoint,
# later ones, and after the first row. Checkpoints are the largest files, so they meet the end first; tests/test_disk.py strikes
# each of the others.
BARE = (16, 80, 1500)
FURNISHED = (2900, 3600, 4800, 6500, 7000, 7200, 7500, 8400, 9200, 10400)
ROOM = "64m"
# Lines of a table that tell when and how long, not what.
TIMES = re.compile(r"^.*(training [\d.]+ (s|min|h)|pre-training).*$", re.MULTILINE)


def run(out: Path, **changes: str | None) -> tuple[int, str]:
    """Exit code, and all that is said; `changes` to the environment, None: without it."""
    # Both are processes of their own, and not what is compared; tests/test_wandb.py fills the disk of the copy for wandb.
    known = os.environ | {"WANDB_MODE": "disabled", live.SWITCH: "off"} | changes
    variables = {name: value for name, value in known.items() if value is not None}
    command = [sys.executable, "-m", "fpn_ablate", *ARGUMENTS, f"out={out}"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout + done.stderr


def made(out: Path) -> dict[str, object]:
    """What a sweep has found, of each row and in its tables: all that must not depend on what happened on the way."""
    found: dict[str, object] = {}
    for file in sorted(out.glob(f"runs/*/*/*/*/{RECORD}")):
        record = json.loads(file.read_text())
        name = f"{record['table']}/{record['row']}"
        found[f"{name} status"], found[f"{name} metrics"] = record["status"], record["metrics"]
        if record["status"] == "finished":
            state = torch.load(file.with_name(MODEL), weights_only=True)
            found[f"{name} weights"] = {key: value.numpy().tobytes() for key, value in state.items()}
            with np.load(file.with_name(DETECTIONS)) as arrays:
                found[f"{name} detections"] = {key: arrays[key].tobytes() for key in arrays.files}
            found[f"{name} metrics.jsonl"] = file.with_name("metrics.jsonl").read_text()
    tables = sorted(file for kind in ("md", "csv", "tex") for file in (out / "tables").glob(f"*.{kind}"))
    return found | {file.name: TIMES.sub("", file.read_text()) for file in tables}


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
    """How the end differs from that of a sweep that nothing has disturbed."""
    found = made(out)
    differing = [name for name in undisturbed if found.get(name) != undisturbed[name]]
    return [*([f"exit code {code}"] if code else []), *(f"{name} differs" for name in differing)]


def told(text: str, fix: str = "make room") -> list[str]:
    """What is wrong with how a fault was told: a traceback of this package's, or no line with the place and what to do."""
    own = [line for line in text.splitlines() if "cannot be written" in line and fix in line and "/" in line]
    return [*([] if own else ["no line names the place and the fix"]), *(["a traceback"] if "Traceback" in text else [])]


def finished(out: Path) -> set[str]:
    records = [json.loads(file.read_text()) for file in out.glob(f"runs/*/*/*/*/{RECORD}")]
    return {record["row"] for record in records if record["status"] == "finished"}


def disk_full(undisturbed: dict[str, object], scratch: Path) -> Iterator[tuple[str, list[str]]]:
    for size in (*BARE, *FURNISHED):
        with mounted(scratch / f"full{size}", f"{size}k") as disk:
            out = disk / "results"
            if size in FURNISHED:
                shutil.copytree(scratch / "undisturbed" / "backbones", out / "backbones")
            code, text = run(out)
            states, kept = sorted(re.findall(r'"status": "(\w+)"', "".join(_texts(out)))), finished(out)
            wrong = [*told(text), *([] if code else ["exit code 0"])]
            struck = sorted({Path(match).name for match in re.findall(r"(\S+): cannot be written", text)})
            remount(disk, f"size={ROOM}")
            code, text = run(out)
            again = [row for row in kept if f"{row} seed 0: finished before" not in text]
            wrong += [*(f"{row} was done twice" for row in again), *problems(undisturbed, out, code)]
            yield f"{size} KiB: struck {', '.join(struck)}; records {', '.join(states) or 'none'}", wrong


def _texts(out: Path) -> list[str]:
    return [file.read_text() for file in out.glob(f"runs/*/*/*/*/{RECORD}")]


def read_only(undisturbed: dict[str, object], scratch: Path) -> Iterator[tuple[str, list[str]]]:
    with mounted(scratch / "read_only", ROOM) as disk:
        out = disk / "results"
        remount(disk, "ro")
        code, text = run(out)
        wrong = [*told(text, "make it writable"), *([] if code else ["exit code 0"])]
        remount(disk, "rw")
        code, _ = run(out)
        yield "an empty folder", [*wrong, *problems(undisturbed, out, code)]
        remount(disk, "ro")
        code, text = run(out)
        yield (
            "a finished sweep",
            [*told(text, "make it writable"), *problems(undisturbed, out, 0), *([] if code else ["exit 0"])],
        )
        command = [sys.executable, "-m", "fpn_ablate", "report", str(out / "runs"), "--out", str(scratch / "elsewhere")]
        code = subprocess.run(command, capture_output=True, text=True).returncode
        tables = made(scratch / "elsewhere")
        wrong = [name for name in tables if tables[name] != undisturbed[name]] or ([] if tables else ["no tables"])
        yield "its tables, written elsewhere", [*wrong, *([f"exit code {code}"] if code else [])]


def around(undisturbed: dict[str, object], scratch: Path) -> Iterator[tuple[str, list[str]]]:
    """Places beside the results: nothing of a run may depend on them, or it says so."""
    with mounted(scratch / "tmp", "64k") as tmp, mounted(scratch / "home", "64k") as home:
        (tmp / "much").write_bytes(bytes(64 * 1024))
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
# What is wrong, what is held against what, and how it is tried.
DRILLS: dict[str, tuple[str, str, Callable]] = {
    "disk_full": ("disk full (ENOSPC)", f"the same command, once there is room, {SAME}", disk_full),
    "read_only": ("read-only results folder (EROFS)", f"the same command, once it is writable, {SAME}", read_only),
    "around": ("HOME, TMPDIR or the terminal's disk full, read-only or missing", f"a sweep there {SAME}", around),
}


def keep(folder: Path, name: str, tries: list[dict]) -> None:
    """Write what has been tried so far."""
    fault, how, _ = DRILLS[name]
    found = {"fault": fault, "tries": len(tries), "lost": sum(bool(one["findings"]) for one in tries), "how": how}
    found |= {"command": f"python scripts/drills/disk.py {name}", "machine": machine(torch.device("cpu")), "each": tries}
    save_text(folder / f"{name}.json", json.dumps(found, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python scripts/drills/disk.py", description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", help=f"of {', '.join(DRILLS)} (default: all)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the figures (default results/reference/reliability)")
    given = parser.parse_args(argv)
    lost = 0
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        code, text = run(scratch / "undisturbed")
        if code:
            print(text)
            return 2
        undisturbed = made(scratch / "undisturbed")
        for name in given.what or DRILLS:
            tries: list[dict] = []
            for what, wrong in DRILLS[name][-1](undisturbed, scratch):
                print(f"{name}: {what}: {'; '.join(wrong) or 'nothing lost'}", flush=True)
                tries.append({"try": what, "findings": wrong})
                keep(given.out, name, tries)
            lost += sum(bool(one["findings"]) for one in tries)
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())

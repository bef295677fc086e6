"""Disks that are full, read-only or beyond a quota, at every place where the package writes.

The places are found in the source: a new one that does not go through `files.write_atomically` fails a test until it is named
in BARE, with what becomes of a full disk there. /dev/full takes no byte (ENOSPC), from whatever library it is written to.
"""

import ast
import errno
import io
import os
import shutil
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from settings import TINY

from fpn_ablate.cli.main import main
from fpn_ablate.report.formats import plots
from fpn_ablate.report.html import figures
from fpn_ablate.runs import run as running
from fpn_ablate.store import record
from fpn_ablate.store.layout import find_run, run_folder
from fpn_ablate.sweep import checks
from fpn_ablate.tracking import loggers
from fpn_ablate.tracking.progress import Progress
from fpn_ablate.utils import console
from fpn_ablate.utils.content import cache_folder
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.files import write_atomically
from fpn_ablate.utils.paths import PACKAGE

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
# Every step writes a checkpoint and a line of metrics.
STEPS = (*TINY, "recipe.checkpoint_every=1", "recipe.eval_images=1", "rpn.samples=16", "log.every=1")

# ------------------------------------------------------------------------------------------------- where the package writes

# Places that do not go through write_atomically, and what becomes of a full or read-only disk there.
HANDED = "handed to write_atomically by its callers"
BARE = {
    "data/shapes/cache.py:_write_pixels": HANDED,
    "engine/cost.py:reset_peak_memory": "the kernel's own file: left out",
    "evaluation/coco.py:save": HANDED,
    "report/html/live.py:_locks": "no page: a warning at the end of a sweep",
    "report/html/live.py:start": "no page: a warning at the start of a sweep",
    "report/html/live.py:watch": "no page while the sweep goes on",
    "report/html/live.py:write": "no page: test_tables_that_cannot_be_written_are_told_and_an_exit_code",
    "runs/follow.py:follow": "the null device",
    "runs/ranks.py:_start": "processes that write what rank 0 would",
    "store/leftovers.py:remove": "not removed: said of the file, with the reason",
    "store/bootstrap_store.py:save": HANDED,
    "store/plan.py:write_plan": "no page: a warning at the start of a sweep",
    "sweep/checks.py:check_writable": "UserError: test_no_room_is_told_before_anything_is_trained",
    "sweep/publish.py:mark_killed": "the record stays as it was: a warning",
    "tracking/loggers.py:__init__": "UserError of write_atomically; then test_a_line_that_is_not_taken_is_told",
    "tracking/progress.py:__init__": "no display of what workers do",
    "tracking/progress.py:_write": "that display stands still",
    "tracking/progress.py:relay_lines": "lines of the worker are lost: test_a_worker_s_lines_may_be_lost",
    "tracking/wandb_client.py:_open": "no copy, a line: tests/tracking/test_wandb.py",
    "utils/files.py:refuse_bomb": "an archive that is read",
    "utils/files.py:write_atomically": "UserError: test_what_a_library_cannot_write_leaves_the_old_file",
    "utils/locks.py:exclusive": "UserError: test_a_folder_that_cannot_be_made_is_told",
    "utils/locks.py:is_free": "counts as free: the job that then takes the lock says what is wrong",
    "utils/locks.py:lock": "UserError: test_a_folder_that_cannot_be_made_is_told",
    "weights/files.py:write_safetensors": "bytes in memory",
}
NAMES = {
    *("write_text", "write_bytes", "mkdir", "makedirs", "touch", "rename", "symlink_to", "hardlink_to", "link", "symlink"),
    *("mkdtemp", "mkstemp", "TemporaryFile", "NamedTemporaryFile", "TemporaryDirectory", "copyfile", "copy2", "copytree"),
    *(
        "move",
        "savez",
        "savez_compressed",
        "savefig",
        "save_file",
        "dump",
        "FileIO",
        "FileLock",
        "lock",
        "ZipFile",
        "TarFile",
        "Popen",
    ),
}
OWN = {"output", "live"}  # our modules whose `save` is looked into itself


def writes(call: ast.Call) -> bool:
    """Whether a call may make or change a file: by its name, and by what tells it from others of that name."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    of = getattr(getattr(call.func, "value", None), "id", "")
    first = getattr(call.args[0], "id", "") if call.args else ""
    if name == "open":  # builtin, of a path, of an archive
        modes = [a.value for a in (*call.args, *(k.value for k in call.keywords)) if isinstance(a, ast.Constant)]
        return any(isinstance(mode, str) and set(mode) & set("wax+") and set(mode) <= set("rwaxbt+") for mode in modes)
    if name in ("save", "replace"):  # of pictures and tensors; of a path, not of a text or a dataclass
        path_like = len(call.args) == 1 and not call.keywords if name == "replace" else isinstance(call.func, ast.Attribute)
        return path_like and of not in OWN and first != "buffer"
    return name in NAMES and first != "buffer" and (name, of) != ("dump", "ast")


def places(source: str) -> set[str]:
    """Functions of a source with a call that writes outside of write_atomically's arguments."""
    found = set()

    def look(node: ast.AST, where: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner = child.name if isinstance(child, ast.FunctionDef) else where
            if isinstance(child, ast.Call) and getattr(child.func, "id", "") == "write_atomically":
                continue
            if isinstance(child, ast.Call) and writes(child):
                found.add(inner)
            look(child, inner)

    look(ast.parse(source), "module")
    return found


def test_every_place_that_writes_is_atomic_or_known():
    paths = sorted(path for path in PACKAGE.rglob("*.py") if "conf" not in path.relative_to(PACKAGE).parts)
    found = {f"{path.relative_to(PACKAGE).as_posix()}:{place}" for path in paths for place in places(path.read_text())}
    assert found - set(BARE) == set(), "write there by files.write_atomically, or say in BARE what a full disk does"
    assert set(BARE) - found == set(), "no longer there"


@pytest.mark.parametrize(
    "line",
    [
        *("path.write_text('x')", "open(path, 'w')", "path.open('ab')", "np.savez(path, x=1)", "torch.save(x, path)"),
        *("image.save(path)", "shutil.copyfile(a, b)", "a.replace(b)", "zipfile.ZipFile(path, 'w')", "tempfile.mkstemp()"),
        "path.open(mode='x')",
    ],
)
def test_the_search_sees_what_writes(line):
    assert places(f"def here():\n    {line}") == {"here"}
    assert places(f"def here():\n    write_atomically(path, lambda temporary: {line})") == set()


@pytest.mark.parametrize(
    "line", ["open(path)", "open(path, 'rb')", "text.replace('a', 'b')", "replace(cfg, seed=1)", "figure.savefig(buffer)"]
)
def test_the_search_leaves_out_what_does_not(line):
    assert places(f"def here():\n    {line}") == set()


# ---------------------------------------------------------------------------------------------------- one file, every library


def figure() -> Figure:
    made = Figure(figsize=(1, 1))
    made.subplots().plot([0, 1])
    return made


LIBRARIES = {
    "text": lambda path: path.write_text("new"),
    "bytes": lambda path: path.write_bytes(b"new"),
    "torch": lambda path: torch.save({"weight": torch.zeros(10_000)}, path),
    "numpy": lambda path: np.savez_compressed(path, boxes=np.zeros(4)),
    "zip": lambda path: zipfile.ZipFile(path, "w").writestr("a", "b"),
    "picture": lambda path: Image.new("RGB", (8, 8)).save(path, "PNG"),
    "figure": lambda path: figure().savefig(path, format="svg"),
    "copy": partial(shutil.copyfile, __file__),
}


@needs_full
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # an archive that is closed by the collector
@pytest.mark.parametrize("library", LIBRARIES)
def test_what_a_library_cannot_write_leaves_the_old_file(tmp_path, library):
    path = tmp_path / "kept.npz"
    path.write_text("old")

    def on_a_full_disk(temporary):
        temporary.unlink()
        temporary.symlink_to(FULL)  # the libraries open it by its name
        LIBRARIES[library](temporary)
        raise AssertionError("a full disk has taken it")

    with pytest.raises(UserError, match=r"kept\.npz: cannot be written \(.+\); make room, then run the same command again"):
        write_atomically(path, on_a_full_disk)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("kept.npz", "old")]


def failing(number: int):
    def fail(*arguments, **named):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOSPC, "make room, then run the same command again"),
        (errno.EDQUOT, "make room, then run the same command again"),
        (errno.EFBIG, "make room, then run the same command again"),
        (errno.EROFS, "make it writable, or choose another path"),
        (errno.EACCES, "make it writable, or choose another path"),
        (errno.EIO, "make it writable, or choose another path"),
    ],
)
@pytest.mark.parametrize("call", ["open", "fsync", "replace", "mkdir"])
def test_each_fault_at_each_step_of_a_write_is_told_with_its_fix(tmp_path, monkeypatch, number, fix, call):
    path = tmp_path / "record.json"
    path.write_text("old")
    where = {"open": (io, "open"), "fsync": (os, "fsync"), "replace": (Path, "replace"), "mkdir": (Path, "mkdir")}[call]
    with monkeypatch.context() as patch:
        patch.setattr(*where, failing(number))
        with pytest.raises(UserError, match=rf"record\.json: cannot be written \({os.strerror(number)}\); {fix}"):
            write_atomically(path, lambda temporary: temporary.write_text("new"))
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("record.json", "old")]


def test_the_room_of_a_file_that_was_not_taken_is_free_at_once(tmp_path):
    """torch's writer keeps the file open as long as its error lives, and the record that says `failed` needs the room."""
    open_still = []

    def torn(temporary):
        open_still.append(temporary.open("wb"))
        open_still[0].write(bytes(100_000))
        open_still[0].flush()
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError):
        write_atomically(tmp_path / "checkpoint.pt", torn)
    assert os.fstat(open_still[0].fileno()).st_size == 0
    open_still[0].close()


# ------------------------------------------------------------------------------------------------------ a run, file by file


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """A run that nothing has disturbed: its configuration, its folder, the names of the files that it has written."""
    cfg = config(*STEPS).model_copy(update={"out": str(tmp_path_factory.mktemp("whole"))})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "end_to_end_latency_ms", lambda *arguments: 1.0)
        patch.setattr(running, "end_to_end_memory_mib", lambda *arguments: 1)
        seen = strike(patch, lambda name, time: False)
        outcome = running.run(cfg)
    return cfg, run_folder(cfg, outcome["fingerprint"]), seen


@pytest.fixture(autouse=True)
def in_no_time(monkeypatch):
    """Latency and plots take most of a tiny run, and nothing here is about them."""
    monkeypatch.setattr(running, "end_to_end_latency_ms", lambda *arguments: 1.0)
    monkeypatch.setattr(running, "end_to_end_memory_mib", lambda *arguments: 1)
    for module in (plots, figures):
        monkeypatch.setattr(module, "render", lambda table: {})


def strike(monkeypatch, is_it) -> list[str]:
    """Let fsync fail, as network disks do that are full, where `is_it` says so of a file's name and of how often it
    has come; returns the names."""
    fsync, seen = os.fsync, []

    def full(number: int) -> None:
        file = Path(os.readlink(f"/proc/self/fd/{number}"))
        if file.is_dir() or file.is_relative_to(cache_folder()):  # tests/data/test_shapes_cache.py
            return fsync(number)
        seen.append(file.name.split(f".{os.getpid()}")[0].removeprefix("."))
        if is_it(seen[-1], seen.count(seen[-1])):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        return fsync(number)

    monkeypatch.setattr(os, "fsync", full)
    return seen


linux = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to tell one file from another")


# In turn, as one attempt after the other meets them: a file's name, and which of its writes in that attempt.
STRUCK = [
    *(("config.yaml", 1), ("record.json", 1), ("metrics.jsonl", 1), ("metrics.jsonl", 2), ("checkpoint.pt", 1)),
    ("metrics.jsonl", 3),  # after the first checkpoint, from which what follows goes on
    *(("model.pt", 1), ("detections.npz", 1), ("metrics.jsonl", 2), ("record.json", 2)),
]
SHOWN = {"resampled.npz", "artifacts.npz", "truth.json", "skip.json"}


@linux
def test_a_run_writes_nothing_that_is_not_struck_below(whole):
    assert {name for name in whole[2] if not name.endswith(".jpg")} == {name for name, _ in STRUCK} | SHOWN


@linux
def test_a_run_that_lacks_room_says_so_each_time_and_goes_on_to_the_same_end(whole, tmp_path, monkeypatch):
    cfg, folder = whole[0].model_copy(update={"out": str(tmp_path)}), whole[1]
    own = run_folder(cfg, record.read(folder)["fingerprint"])
    for name, time in STRUCK:
        with monkeypatch.context() as patch:
            strike(patch, lambda *now, struck=(name, time): now == struck)
            with pytest.raises(UserError, match=rf"{name}: cannot be written \(Disk quota exceeded\); make room"):
                running.run(cfg)
        left = record.read(own)
        assert (left["status"], left["metrics"]) == ("failed", {}), f"after {name}"
        assert not [file for file in own.iterdir() if file.name.startswith(".")]
    outcome = running.run(cfg)
    assert (outcome["status"], outcome["metrics"]) == ("finished", record.read(folder)["metrics"])
    assert (own / "metrics.jsonl").read_text() == (folder / "metrics.jsonl").read_text()
    ours, theirs = (torch.load(one / "model.pt", weights_only=True) for one in (own, folder))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@linux
def test_what_a_report_shows_is_no_reason_to_lose_a_run(whole, tmp_path, monkeypatch, capsys):
    cfg = whole[0].model_copy(update={"out": str(tmp_path)})
    strike(monkeypatch, lambda name, time: name in SHOWN or name.endswith(".jpg"))
    assert running.run(cfg)["metrics"] == record.read(whole[1])["metrics"]
    assert "warning: " in (told := capsys.readouterr().err)
    assert "resampled.npz: cannot be written (Disk quota exceeded)" in told and "python -m fpn_ablate artifacts" in told


@linux
def test_a_run_that_is_taken_over_without_room_is_not_taken_for_whole(whole, monkeypatch):
    cfg = whole[0].model_copy(update={"table": "another"})
    with monkeypatch.context() as patch:
        strike(patch, lambda name, time: name == "model.pt")
        with pytest.raises(UserError, match=r"model\.pt: cannot be written"):
            running.run(cfg)
    folder = run_folder(cfg, record.read(whole[1])["fingerprint"])
    assert record.read(folder) is None and not (folder / "model.pt").exists()
    assert running.run(cfg)["status"] == "finished" and (folder / "model.pt").exists()


def test_a_folder_that_cannot_be_made_is_told(whole, tmp_path):
    (tmp_path / "runs").touch()  # a file
    with pytest.raises(UserError, match=r"\.locks/\w+: cannot be written \(Not a directory\); a file is where a folder"):
        running.run(whole[0].model_copy(update={"out": str(tmp_path)}))


@pytest.mark.parametrize("depth", [1, 2, 3, 4])  # the seed's folder, the row's, the recipe's, the table's
def test_a_folder_that_leads_out_is_refused_and_nothing_is_written_there(whole, tmp_path, depth):
    cfg = whole[0].model_copy(update={"out": str(tmp_path / "out")})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    place = [whole[1], *whole[1].parents][depth - 1].relative_to(whole[0].out)
    (tmp_path / "out" / place).parent.mkdir(parents=True)
    (tmp_path / "out" / place).symlink_to(elsewhere)
    with pytest.raises(UserError, match=r"a symbolic link that leads out of .*; put a folder in its place, or give out=FOLDER"):
        running.run(cfg)
    assert list(elsewhere.iterdir()) == []


def test_a_run_that_lies_elsewhere_is_not_found_and_a_linked_out_is(whole, tmp_path):
    mark = record.read(whole[1])["fingerprint"]
    (tmp_path / "linked").symlink_to(whole[0].out)
    assert find_run(tmp_path / "linked", 0, mark)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "runs").symlink_to(Path(whole[0].out) / "runs")
    assert find_run(tmp_path / "out", 0, mark) is None


# ----------------------------------------------------------------------------------------------------------- around the runs


@pytest.mark.parametrize("name", ["runs", "runs/.plans", "runs/.locks", "runs/.pictures", "runs/multirun.yaml"])
def test_a_place_of_a_sweep_that_leads_out_is_refused_before_anything_is_written(tmp_path, name):
    (tmp_path / "elsewhere").mkdir()
    place = tmp_path / "out" / name
    place.parent.mkdir(parents=True)
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"out/{name}: a symbolic link that leads out of"):
        checks.check_writable(str(tmp_path / "out"))
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "real").mkdir()
    checks.check_writable(str(tmp_path / "linked"))


@needs_full
def test_a_line_that_is_not_taken_is_told_and_closing_is_quiet(tmp_path):
    lines = loggers.JsonLines(tmp_path / "metrics.jsonl")
    lines._file.close()
    lines._file = FULL.open("w")
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\); make room"):
        lines.log(1, {"loss": 1.0})
    lines.close()


@needs_full
def test_a_terminal_that_takes_nothing_does_not_stop_a_run(whole, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(f"sys.{name}", FULL.open("w"))
    console.log_line("x" * 100_000)
    with Progress("fpn seed 0", 2) as shown:
        shown.log(2, {"loss": 1.0, "lr": 0.1})
    assert running.run(whole[0])["status"] == "finished"  # before, which it says
    monkeypatch.undo()


@pytest.mark.parametrize("fault", [errno.EDQUOT, errno.ENOSPC, errno.EROFS])
def test_no_room_is_told_before_anything_is_trained(tmp_path, monkeypatch, capsys, fault):
    monkeypatch.setattr(os, "fsync", failing(fault))
    with pytest.raises(UserError, match=rf"out=\S+: cannot be written \({os.strerror(fault)}\); make "):
        checks.check_writable(str(tmp_path))


@linux
def test_tables_that_cannot_be_written_are_told_and_an_exit_code(tmp_path, monkeypatch, capsys, whole):
    """The rows are finished, and stay so: the same command makes the tables once there is room."""
    shutil.copytree(whole[0].out, tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["fpn-ablate"])
    monkeypatch.setattr("sys.path", [*os.sys.path])
    with monkeypatch.context() as patch:
        strike(patch, lambda name, time: name.endswith((".md", ".csv")))
        assert main(STEPS) == 1
    told = capsys.readouterr().err
    assert ".md: cannot be written (Disk quota exceeded); make room" in told and "ledger.csv is not written" in told
    assert "Traceback" not in told and not (tmp_path / "results" / "ledger.csv").exists()
    assert main(STEPS) == 0
    assert (tmp_path / "results" / "ledger.csv").exists() and "finished before" in capsys.readouterr().out


def test_an_export_without_room_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))
    assert main(["shapes", "--export", str(tmp_path / "set"), "--train", "1", "--val", "1", "--size", "64"]) == 2
    assert "000001.png: cannot be written (No space left on device); make room" in capsys.readouterr().err
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]

"""The copy for wandb: it holds what the run's files hold, once, and nothing that happens to it changes a run."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import types
from contextlib import suppress
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from settings import SHORT

from fpn_ablate.cli.main import main
from fpn_ablate.runs import run as running
from fpn_ablate.store import layout
from fpn_ablate.tracking import wandb_client
from fpn_ablate.tracking.wandb_client import Wandb, init_arguments, run_id, wandb_loggers

KNOWN = {
    "fingerprint": "0123456789abcdef",
    "table": "table1_rpn",
    "recipe": "quick",
    "row": "fpn",
    "seed": 2,
    "data": "shapes",
    "generated": True,
    "task": "rpn",
    "config": {"neck": {"top_down": True}, "log": {"project": "pyramids"}},
}
RESULT = {"status": "finished", "error": None, "metrics": {"AR100": 0.5, "AR100_l": None}, "cost": {"train_s": 3.0}}


@pytest.fixture(autouse=True)
def switched_on(monkeypatch, tmp_path):
    """As on a machine where nobody has an account."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    wandb_client.log_once.cache_clear()


def append(folder, *lines):
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)


def run_folder(place, **changes):
    """A finished run without its weights."""
    place.mkdir(parents=True)
    append(place, {"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}, {"step": 2, "AR100": 0.5}, '{"step": 3, "lo')
    (place / "record.json").write_text(json.dumps(KNOWN | RESULT | changes))
    return place


def inspected(folder):
    """The records of a run's one offline copy, as wandb's own reader gives them: kind -> list."""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = {}
    for record in map(json.loads, done.stdout.splitlines()):
        found.setdefault(record["type"], []).append(record.get(record["type"]))
    return found


def history(records):
    return [{k: v for k, v in line["item"].items() if k == "_step" or k[0] != "_"} for line in records["history"]]


def marker(folder):
    return json.loads((folder / "wandb.json").read_text())


def test_a_run_is_copied_while_it_goes_on(tmp_path, capsys, monkeypatch):
    """Every line, the configuration, the figures and a picture, under names by which runs are found; nothing is printed."""
    append(tmp_path, {"step": 1, "loss": 0.5})  # of an earlier start
    states = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    handlers = [signal.getsignal(number) for number in signal.Signals]
    copy = Wandb(KNOWN, tmp_path, "offline")
    copy.log(2, {"loss": 0.25})
    copy.log(3, {"loss": 0.125})
    copy.log(3, {"AR100": 0.5})
    Image.new("RGB", (4, 4)).save(tmp_path / "1.jpg")
    monkeypatch.setattr(wandb_client, "images_with_boxes", lambda folder, record: [(folder / "1.jpg", {})])
    (tmp_path / "record.json").write_text(json.dumps(KNOWN | RESULT))
    copy.close()
    assert capsys.readouterr() == ("", "")
    assert states == (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert handlers == [signal.getsignal(number) for number in signal.Signals]
    records = inspected(tmp_path)
    (run,) = records["run"]
    assert (run["run_id"], run["project"], run["run_group"], run["job_type"]) == (
        *(run_id(KNOWN), "pyramids"),
        *("table1_rpn shapes quick", "fpn"),
    )
    assert (run["display_name"], run["tags"]) == ("fpn-seed2", ["rpn", "quick", "shapes", "generated data"])
    assert run["config"]["update"]["neck"] == {"top_down": True}
    lines = history(records)
    assert [line["_step"] for line in lines] == [1, 2, 3]
    assert [line["loss"] for line in lines] == [0.5, 0.25, 0.125]
    assert lines[-1]["AR100"] == 0.5
    assert [value for key, value in lines[-1].items() if re.fullmatch(r"detections/.*\._type", key)] == ["image-file"]
    summary = {key: value for part in records["summary"] for key, value in part.get("update", {}).items()}
    assert (summary["AR100"], summary["cost/train_s"], summary["status"]) == (0.5, 3.0, "finished")
    assert records["exit"][0].get("exit_code", 0) == 0
    assert marker(tmp_path)["mode"] == "offline"


def test_a_replayed_run_is_copied_once(tmp_path, capsys):
    """`replay` twice, and again when `wandb sync` has sent it; a run that is not finished is skipped."""
    folder = run_folder(tmp_path / "deep" / "run")
    run_folder(tmp_path / "diverged", status="diverged")
    assert main(["replay", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    (place,) = folder.glob("wandb/offline-run-*")
    assert f"{folder}: offline copy; to send it: wandb sync {place}\n" in told
    assert "skipped: not finished (diverged)" in told and not (tmp_path / "diverged" / "wandb").exists()
    assert [line["_step"] for line in history(inspected(folder))] == [1, 2]
    before = {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}  # wandb's logs are links to other folders
    assert main(["replay", str(folder), str(folder)]) == 0
    assert {path: path.lstat().st_mtime_ns for path in folder.rglob("*")} == before
    (place / f"run-{run_id(KNOWN)}.wandb.synced").touch()
    assert main(["replay", "--online", str(folder)]) == 0
    assert f"on wandb as {run_id(KNOWN)}" in capsys.readouterr().out
    assert main(["replay", str(tmp_path / "nowhere")]) == 2


@pytest.mark.slow
def test_a_replay_without_an_account_or_again_leaves_one_copy(tmp_path, capsys):
    folder = run_folder(tmp_path / "run")
    assert main(["replay", "--online", str(folder)]) == 2
    assert "API key" in capsys.readouterr().err
    (first,) = folder.glob("wandb/offline-run-*")
    time.sleep(1)  # the folder's name has seconds
    assert main(["replay", "--again", str(folder)]) == 0
    (second,) = folder.glob("wandb/offline-run-*")
    assert first != second and len(history(inspected(folder))) == 2


class FakeWandb(types.ModuleType):
    """wandb, and a run that has the first step already. `fault`: what goes wrong online."""

    starting_step, id, summary = 2, run_id(KNOWN), {}

    def __init__(self, folder, fault=None):
        super().__init__("wandb")
        self.fault, self.calls, self.lines, self.dir = fault, [], [], str(folder / "wandb" / "run" / "files")
        self.Settings = type("Settings", (), {"model_fields": {"silent"}, "__init__": lambda self, silent: None})

    def init(self, **arguments):
        self.calls.append((arguments["mode"], arguments.get("resume"), arguments["id"]))
        if self.fault and arguments["mode"] == "online":
            raise self.fault
        return self

    def setup(self, settings):
        assert settings

    def log(self, values, step):
        self.lines.append((step, values))

    def teardown(self):
        self.calls.append("teardown")

    def finish(self, exit_code):
        assert exit_code == 0


def test_online_it_goes_on_under_its_id_and_else_is_offline(monkeypatch, tmp_path, capsys):
    """Without the lines that wandb has of an earlier start, and without copies that were not sent."""
    unsent, sent = (tmp_path / "wandb" / f"run-{n}-{run_id(KNOWN)}" for n in (1, 2))
    (tmp_path / "record.json").write_text(json.dumps(KNOWN | RESULT))
    for folder in (unsent, sent):
        folder.mkdir(parents=True)
    (sent / "run.wandb.synced").touch()
    for fault, mode in ((None, "online"), (ConnectionError("no\nnetwork"), "offline")):
        wandb = FakeWandb(tmp_path, fault)
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        copy = Wandb(KNOWN, tmp_path, "online")
        for step in (1, 2, 1, 2, 3):
            copy.log(step, {"loss": step})
        copy.close()
        assert wandb.calls[0] == ("online", "allow", run_id(KNOWN))
        assert wandb.calls[1:] == (["teardown", ("offline", None, run_id(KNOWN))] if fault else [])
        assert wandb.lines == [(2, {"loss": 2}), (2, {"loss": 2}), (3, {"loss": 3})]
        assert (marker(tmp_path)["mode"], sent.exists(), unsent.exists()) == (mode, True, False)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "wandb: not online (ConnectionError: no network); this is an offline copy, which `wandb sync` sends"


def test_names_fit_wandbs_limits():
    known = KNOWN | {key: key[0] * 300 for key in ("table", "recipe", "row", "data", "task")}
    named = init_arguments(known)
    assert max(map(len, named["tags"])) <= 64 and len(named["id"]) <= 64 and len(named["job_type"]) <= 64
    assert len(named["group"]) <= 128 and len(named["name"]) <= 128 and named["name"].endswith("-seed2")


def test_a_copy_names_no_machines_paths():
    known = KNOWN | {"config": {"neck": {"file": "/home/me/a.pth"}}, "environment": {"command": "x data.root=~me/sets/a"}}
    sent = init_arguments(known)["config"]
    assert (sent["neck"], sent["environment"]) == ({"file": "…/a.pth"}, {"command": "x data.root=…/a"})


def test_a_cell_has_an_id_of_its_own_in_each_table():
    places = [KNOWN, KNOWN | {"table": "other"}, KNOWN | {"row": "other"}, KNOWN | {"fingerprint": "f" * 16}]
    assert len({run_id(known) for known in places}) == len(places)
    assert run_id(KNOWN | RESULT | {"seed": 3}) == run_id(KNOWN)


def test_it_can_be_switched_off_and_is_offline_by_default(tmp_path, monkeypatch, capsys, config):
    assert (config().log.wandb, config("log=wandb").log.wandb) == ("offline", "online")
    assert wandb_loggers(KNOWN, tmp_path, "disabled") == []
    with monkeypatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        assert wandb_loggers(KNOWN, tmp_path, "online") == []
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------------------------------- what can go wrong


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """A cell without a copy: its configuration, its record, its folder."""
    cfg = config(*SHORT, "log.wandb=disabled").model_copy(update={"out": str(tmp_path_factory.mktemp("alone"))})
    outcome = running.run(cfg)
    return cfg, outcome, layout.run_folder(cfg, outcome["fingerprint"])


def test_a_cell_is_copied_in_each_table_in_which_it_stands(alone, monkeypatch):
    cfg, made = alone[0], []

    def note(known, folder, mode):
        made.append((run_id(known), folder, known.get("status"), mode))
        return []

    monkeypatch.setattr(running, "wandb_loggers", note)
    for table in ("second", "second", "third"):  # it is finished the second time
        running.run(cfg.model_copy(update={"table": table}))
    ids, folders, states, modes = zip(*made, strict=True)
    assert len(set(ids)) == 2 and [folder.parents[2].name for folder in folders] == ["second", "third"]
    assert (set(states), set(modes)) == ({"finished"}, {"disabled"})


def the_same(folder, outcome, alone):
    _, expected, place = alone
    for name in ("model.pt", "metrics.jsonl"):
        assert (folder / name).read_bytes() == (place / name).read_bytes(), name
    assert [outcome[key] for key in ("status", "metrics", "fingerprint")] == [
        expected[key] for key in ("status", "metrics", "fingerprint")
    ]


def service():
    """The process id of wandb-core, once it runs."""
    for _ in range(600):
        for tasks in Path("/proc/self/task").glob("*/children"):
            for child in tasks.read_text().split():
                with suppress(OSError):
                    if "wandb-core" in Path(f"/proc/{child}/cmdline").read_text():
                        return int(child)
        time.sleep(0.05)
    raise AssertionError("no service")


@pytest.mark.parametrize(
    ("number", "line"), [(signal.SIGKILL, "no wandb copy"), (signal.SIGSTOP, "not done 1 s after the end of the run")]
)
def test_a_run_does_not_notice_what_happens_to_its_copy(alone, tmp_path, monkeypatch, capsys, number, line):
    """Nor does the next run in the same process."""
    cfg, log = alone[0].model_copy(update={"out": str(tmp_path)}), running.Run.log

    def strike(self, step, values):
        log(self, step, values)
        if step == 2:
            os.kill(service(), number)

    cfg = cfg.model_copy(update={"log": cfg.log.model_copy(update={"wandb": "offline"})})
    with monkeypatch.context() as patch:
        patch.setattr(running.Run, "log", strike)
        patch.setattr(Wandb.close, "__defaults__", (1.0,))
        outcome = running.run(cfg)
    folder = layout.run_folder(cfg, outcome["fingerprint"])
    the_same(folder, outcome, alone)
    said = [text for text in capsys.readouterr().err.splitlines() if "wandb" in text]
    assert len(said) == 1 and line in said[0]
    assert main(["replay", str(folder)]) == 0
    assert marker(folder)["mode"] == "offline"


@pytest.mark.parametrize(
    ("mode", "place", "line"),
    [
        ("offline", "a file", "FileExistsError"),
        ("online", None, "API key"),
        pytest.param("offline", "full", "No space left", marks=pytest.mark.slow),
    ],
)
def test_a_run_does_without_a_folder_an_account_or_room(alone, tmp_path, capsys, mode, place, line):
    cfg = alone[0].model_copy(update={"out": str(tmp_path)})
    cfg = cfg.model_copy(update={"log": cfg.log.model_copy(update={"wandb": mode})})
    folder = layout.run_folder(cfg, alone[1]["fingerprint"])
    folder.mkdir(parents=True)
    if place == "a file":
        (folder / "wandb").touch()
    mounted = place == "full"
    if mounted:
        (folder / "wandb").mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder / "wandb")]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("no small disk can be mounted here")
    try:
        if mounted:
            (folder / "wandb" / "much").write_bytes(bytes(64 * 1024))
        outcome = running.run(cfg)
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder / "wandb")], check=True)
    the_same(folder, outcome, alone)
    said = [text for text in capsys.readouterr().err.splitlines() if "wandb" in text]
    assert len(said) == 1 and line in said[0]


# ------------------------------------------------------------------------------------- what others have put into a folder


@pytest.mark.parametrize("mark", ["../../../kept", "*", "/kept", "0123456789ABCDEF", "", 3, None, ["a"]])
def test_a_forged_fingerprint_removes_nothing(tmp_path, capsys, monkeypatch, mark):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(tmp_path))
    kept = tmp_path / "kept" / f"run-1-x{run_id(KNOWN | {'fingerprint': mark})[-9:]}"
    kept.mkdir(parents=True)
    folder = run_folder(tmp_path / "run", fingerprint=mark)
    (folder / "wandb" / "offline-run-x-").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    assert main(["replay", "--again", str(folder)]) == 0
    assert "skipped: not finished (no readable record)" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_of_copies_that_leads_elsewhere_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(tmp_path))
    kept = tmp_path / "elsewhere" / f"run-1-{run_id(KNOWN)}"
    kept.mkdir(parents=True)
    folder = run_folder(tmp_path / "run")
    (folder / "wandb").symlink_to(kept.parent)
    assert main(["replay", str(folder)]) == 2
    assert "a symbolic link that leads out of" in capsys.readouterr().err
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]


@pytest.mark.parametrize("change", [{"folder": "../../elsewhere"}, {"folder": "/"}, {"folder": 3}, {"mode": None, "id": 3}])
def test_a_forged_marker_of_a_copy_is_none(tmp_path, monkeypatch, change):
    folder = run_folder(tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    content = {"id": "a", "mode": "offline", "folder": "wandb/none"} | change
    (folder / "wandb.json").write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    monkeypatch.setattr(wandb_client, "_in_words", str)
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(folder))
    assert main(["replay", str(folder)]) == 2  # the copy of FakeWandb is no folder
    assert marker(folder)["folder"] == "wandb/run"

"""`python -m fpn_ablate clean`: what can be removed, and what never is."""

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from fpn_ablate.cli import clean
from fpn_ablate.store import leftovers, record
from fpn_ablate.store.layout import LOCKS
from fpn_ablate.utils.locks import lock


def age(path, days):
    for file in (*(path.rglob("*") if path.is_dir() else ()), path):
        os.utime(file, (time.time() - 86400 * days,) * 2)


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Runs of every kind, 10 days old, and one interrupted an hour ago; a cache of pictures."""
    monkeypatch.setenv("FPN_ABLATE_CACHE", str(tmp_path / "cache"))
    for n, status in enumerate(("finished", "failed", "interrupted", "running", "diverged")):
        folder = tmp_path / "results" / "runs" / "table1_rpn" / "quick" / status / f"seed0-{n}"
        record.write(folder, {"status": status, "fingerprint": f"{n:016x}"})
        for name in ("config.yaml", "checkpoint.pt", ".model.pt.123-host.pt"):
            (folder / name).write_bytes(bytes(1000))
        age(folder, 10)
    (tmp_path / "results" / "backbones").mkdir()
    for path in (tmp_path / "results/backbones/small-ab-checkpoint.pt", tmp_path / "results/backbones/small-ab.pt"):
        path.touch()
        age(path, 10)
    (tmp_path / "cache" / "shapes").mkdir(parents=True)
    (tmp_path / "cache" / "shapes" / "a.pixels").touch()
    age(tmp_path / "cache" / "shapes" / "a.pixels", 10)
    recent = tmp_path / "results" / "runs" / "table1_rpn" / "quick" / "recent" / "seed0-9"
    record.write(recent, {"status": "interrupted", "fingerprint": "9" * 16})
    (recent / "config.yaml").touch()
    return tmp_path / "results"


def there(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


RUNS = "runs/table1_rpn/quick"
KEPT = {
    *(f"{RUNS}/finished/seed0-0/{name}" for name in ("config.yaml", "record.json")),
    *(f"{RUNS}/recent/seed0-9/{name}" for name in ("config.yaml", "record.json")),
    "backbones/small-ab.pt",
}


def without_locks(files):
    return {file for file in files if LOCKS not in file and not file.endswith(".lock")}


@pytest.mark.parametrize("arguments", [["--dry-run"], ["--dry-run", "--yes"], []], ids=["dry", "dry yes", "no terminal"])
def test_it_lists_and_removes_nothing_unless_that_is_confirmed(cli, results, arguments):
    before = there(results)
    code, out, _ = cli("clean", *arguments)
    assert code == (0 if arguments else 1)
    assert without_locks(there(results)) == before
    for status in ("failed", "interrupted", "running", "diverged"):
        assert f"results/{RUNS}/{status}/seed0-" in out
    assert f"{RUNS}/finished/seed0-0/checkpoint.pt" in out and "a.pixels" in out and "FINISHED" not in out
    assert "recent" not in out and "in all: " in out


def test_what_is_confirmed_is_removed_and_finished_runs_stay(cli, results, monkeypatch):
    monkeypatch.setattr(clean.sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda question: "n")
    assert cli("clean")[0] == 1
    monkeypatch.setattr("builtins.input", lambda question: "y")
    assert cli("clean")[0] == 0
    assert without_locks(there(results)) == KEPT
    assert not (results / RUNS / "failed").exists() and not list(results.parent.glob("cache/shapes/*"))
    assert cli("clean", "--yes")[1] == "nothing to remove that has been untouched for 7 days (--older DAYS)\n"


def test_kinds_days_and_finished_runs_are_chosen(cli, results):
    assert cli("clean", "--older", "11", "--yes", "--only", "unfinished")[1].startswith("nothing to remove that ")
    cli("clean", "--yes", "--only", "leftovers")
    assert {file.split("/")[3] for file in there(results) if file.endswith("checkpoint.pt") and "runs" in file} == {
        *("failed", "interrupted", "running", "diverged")
    }
    cli("clean", "--yes", "--finished", "--only", "finished")
    assert not (results / RUNS / "finished").exists() and (results / RUNS / "failed").exists()


def test_a_run_that_a_process_works_on_stays(cli, results):
    place = results / "runs" / LOCKS / f"{3:016x}"
    place.parent.mkdir()
    with lock(place):
        assert cli("clean", "--yes")[0] == 0
    assert (results / RUNS / "running" / "seed0-3" / "checkpoint.pt").exists()


def test_a_link_that_leads_out_is_not_followed(cli, results, tmp_path):
    outside = tmp_path / "outside" / "seed0-7"
    record.write(outside, {"status": "failed", "fingerprint": "7" * 16})
    (outside / "config.yaml").touch()
    age(outside, 10)
    (results / RUNS / "linked").symlink_to(outside.parent)
    assert cli("clean", "--yes")[0] == 0
    assert (outside / "config.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "message"), [(["nowhere"], "nowhere: no such folder"), (["--older", "-1"], "--older -1: give a number")]
)
def test_bad_arguments_are_refused(cli, results, arguments, message):
    code, _, err = cli("clean", *arguments)
    assert code == 2 and message in err and Path(results).exists()


def test_a_run_that_has_begun_since_it_was_listed_stays(results):
    (item,) = [item for item in leftovers.find(results, 7) if item.path.parent.name == "interrupted"]
    with lock(item.lock_file), pytest.raises(TimeoutError):
        item.remove()
    (item.path / "checkpoint.pt").touch()  # it has been interrupted again
    with pytest.raises(OSError, match="written since"):
        item.remove()
    age(item.path, 11)
    item.remove()
    assert not item.path.exists()


def test_the_end_of_the_input_confirms_nothing(cli, results, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True, readline=lambda: ""))
    before = there(results)
    code, out, _ = cli("clean", str(results))
    assert code == 1 and out.endswith("nothing removed\n") and without_locks(there(results)) == without_locks(before)

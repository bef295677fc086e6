"""A neck of the user's from the command line: in a run, in sweeps, in workers, and behind finished runs."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from settings import JOINT, TINY
from user_folder import BLOCKS, write

from fpn_ablate.config import user_parts
from fpn_ablate.config.composition import compose
from fpn_ablate.runs import run as running
from fpn_ablate.store import record
from fpn_ablate.store.layout import run_folder

HOUSE = ("-m", "recipe=smoke", "jobs=1", "out=results")


@pytest.fixture
def mine(tmp_path):
    return write(tmp_path / "mine")


@pytest.fixture
def started(monkeypatch):
    """The rows of the jobs that were started, in place of being run."""
    cells = []
    monkeypatch.setattr(running, "run", lambda cfg, number, wait: cells.append(cfg))
    return cells


def rows(cells):
    return [cfg.row for cfg in cells]


def test_a_run_and_a_sweep_have_the_folder(cli, mine, started):
    assert cli("recipe=smoke", "ablation=pan", "neck.depth=3", "--config-dir", mine)[0] == 0
    assert cli("--config-dir", mine, *HOUSE, "ablation=fpn,pan")[0] == 0
    assert cli("--config-dir", mine, *HOUSE, "neck=pan", "neck.depth=1,2")[0] == 0
    assert rows(started) == ["pan+depth=3", "fpn", "pan", "pan+depth=1", "pan+depth=2"]
    assert {cfg.neck.folder for cfg in started if cfg.user_parts} == {mine}


def test_a_table_of_ones_own_sweeps_over_a_key_that_the_necks_file_omits(cli, mine, started):
    params = '{ablation: pan, neck.depth: "1,2", neck.gain: 0.5}'
    write(mine, {"experiments/depths.yaml": f"# @package _global_\ntable: depths\nhydra: {{sweeper: {{params: {params}}}}}\n"})
    assert cli("--config-dir", mine, *HOUSE, "+experiments=depths")[0] == 0
    assert cli("--config-dir", mine, *HOUSE, "+experiments=depths", "neck.depth=5")[0] == 0
    assert [(cfg.table, cfg.neck.arguments["depth"], cfg.neck.arguments["gain"]) for cfg in started] == [
        ("depths", depth, 0.5) for depth in (1, 2, 5)
    ]


@pytest.mark.parametrize("start", [[], ["-m"], ["verify"], ["doctor"]], ids=["run", "sweep", "verify", "doctor"])
def test_a_wrong_key_stops_at_once(cli, mine, started, start):
    code, out, err = cli(*start, "recipe=smoke", "ablation=pan", "neck.dept=3", "--config-dir", mine)
    assert code not in (0, None) and "Traceback" not in out + err and not started
    assert "neck.dept with neck.class=necks.PathAggregation: there is no such key. Did you mean neck.depth?" in out + err


@pytest.mark.parametrize("start", [[], ["-m"], ["verify"], ["doctor"]], ids=["run", "sweep", "verify", "doctor"])
def test_a_neck_that_breaks_its_contract_is_refused_before_anything_runs(cli, mine, started, start):
    write(mine, {"blocks.py": BLOCKS.replace("after, 1)", "after, 1, stride=2)")})
    code, out, err = cli(*start, "recipe=smoke", "ablation=pan", "--config-dir", mine)
    assert code not in (0, None) and "neck.class=necks.PathAggregation: p2 of " in out + err
    assert not started and "Traceback" not in out + err


@pytest.mark.slow
def test_workers_of_joblib_have_the_folder(cli, mine):
    """In processes of their own."""
    code, out, err = cli("--config-dir", mine, "-m", *TINY, "jobs=2", "threads=1", "ablation=pan", "neck.depth=1,2")
    assert code == 0, out + err
    made = [json.loads(file.read_text()) for file in Path("results").rglob("record.json")]
    assert {(record["row"], record["status"]) for record in made} == {(f"pan+depth={n}", "finished") for n in (1, 2)}


# Finished runs.


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished end-to-end run with the neck, and the folder of the neck."""
    out = tmp_path_factory.mktemp("results")
    mine = write(out / "mine")
    cfg = compose([*TINY, *JOINT, "recipe.roi.steps=2", "task.roi.score_thresh=0.0", "ablation=pan", f"out={out}"], mine)
    outcome = running.run(cfg)
    folder = run_folder(cfg, outcome["fingerprint"])
    record.write(folder, {"user_parts": user_parts.describe(cfg.user_parts), **outcome})
    return folder, mine


@pytest.fixture
def finished(trained, tmp_path):
    """A copy of the run and of the neck's folder."""
    folder, mine = trained
    place = tmp_path / folder.relative_to(folder.parents[4])
    shutil.copytree(folder, place)
    return place, shutil.copytree(mine, tmp_path / "mine")


def test_a_network_that_fails_is_refused_with_the_line_of_its_file(cli, tmp_path):
    file = write(tmp_path / "mine") / "necks.py"
    file.write_text(file.read_text().replace('features[f"c{name[1:]}"]', 'features["c9"]'))
    line = next(n for n, text in enumerate(file.read_text().splitlines(), start=1) if "c9" in text)
    code, _, err = cli("verify", "ablation=pan", "--config-dir", file.parent)
    assert code == 2 and f": fails on the maps of an image of 96 x 160: {file}, line {line}: KeyError" in err
    file.write_text(file.read_text().replace("def forward(", "def forwards("))
    code, _, err = cli("verify", "ablation=pan", "--config-dir", file.parent)
    assert code == 2 and f"of {file} has no method forward; define it" in err


def evaluate(folder, *more):
    words = [*TINY, JOINT[0], "task.roi.score_thresh=0.0", "mode=evaluate", f"weights={folder}", "ablation=pan"]
    return [word for word in words if not word.startswith("recipe.steps")] + [*more]


def test_measure_and_artifacts_restore_the_network_with_the_folder(cli, finished):
    folder, mine = finished
    code, out, _ = cli("measure", folder, "--config-dir", mine)
    assert code == 0 and out.endswith("python -m fpn_ablate report runs\n")  # the tables of all rows
    moved = shutil.copytree(folder, mine.parent / "moved")
    assert cli("measure", moved, "--config-dir", mine)[1].endswith(f"python -m fpn_ablate report {moved.name}\n")
    code, out, err = cli("artifacts", folder, "--config-dir", mine)
    assert code == 0 and f"{folder}: made" in out and "stay as they were" not in err
    assert cli("pictures", folder, "--config-dir", mine)[0] == 0


def test_without_the_folder_they_say_what_to_give_and_pictures_need_none(cli, finished):
    folder, _ = finished
    code, _, err = cli("measure", folder)
    assert code == 2 and "its neck is a class of the user's, necks.PathAggregation: give --config-dir FOLDER" in err
    code, out, err = cli("artifacts", folder)
    assert code == 0 and f"{folder}: made" in out
    assert "activation maps stay as they were" in err and "--config-dir FOLDER" in err
    assert cli("pictures", folder)[0] == 0


def test_a_folder_that_has_changed_is_refused(cli, finished):
    folder, mine = finished
    write(mine, {"blocks.py": "raise ValueError('was imported')\n"})
    for command, code in (("measure", 2), ("artifacts", 0), ("pictures", 2)):
        got, out, err = cli(command, folder, "--config-dir", mine)
        assert got == code and "its files as they were when the run was made" in err, command
        assert "was imported" not in out + err


def test_a_run_is_evaluated_with_the_files_that_it_was_made_from(cli, finished):
    folder, mine = finished
    assert cli(*evaluate(folder), "--config-dir", mine)[0] == 0
    write(mine, {"blocks.py": BLOCKS + "\n    x = 3\n"})
    code, out, err = cli(*evaluate(folder), "--config-dir", mine)
    assert code not in (0, None) and f"{folder}: its neck is a class of the user's" in out + err


EVIL = """
    open({marker!r}, "w")


    class Evil:
        def __init__(self, in_levels, *, channels: int = 8): ...


    PathAggregation = Evil
"""


@pytest.mark.parametrize("name", ["os.system", "necks.Evil", "evil.necks.Evil"])
def test_no_class_that_a_record_or_configuration_names_is_ever_imported(cli, finished, monkeypatch, tmp_path, name):
    folder, _ = finished
    marker = tmp_path / "marker"
    for place in (folder, tmp_path, tmp_path / "path", tmp_path / "evil"):
        write(place, {"necks.py": EVIL.format(marker=str(marker))})
    monkeypatch.syspath_prepend(tmp_path / "path")
    values, content = yaml.safe_load((folder / "config.yaml").read_text()), record.read(folder)
    bad = {"class": name, "channels": 8, "folder": str(folder), "_folder": str(folder), "config_dir": str(folder)}
    values["neck"] = bad
    values["task"]["roi"]["head"] = values["rpn"]["head"] = {"class": name}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    digest = {"class": name, "content": "0" * 16, "folder": str(folder)}
    record.write(folder, content | {"config": values, "user_parts": {"neck": digest, "rpn.head": digest}})

    system = []
    monkeypatch.setattr("os.system", system.append)
    for command, expected in (("report", 0), ("measure", 2), ("artifacts", 0), ("pictures", 0)):
        code, out, err = cli(command, folder)
        assert code == expected and "Traceback" not in out + err
        assert ("--config-dir FOLDER" in err) == (command in ("measure", "artifacts")), err
    code, out, err = cli(*evaluate(folder)[:-1], "ablation=fpn")
    assert code not in (0, None) and "does not fit the network" in out + err
    code, out, err = cli(*evaluate(folder)[:-1], "rpn.head={class: necks.Evil}")
    assert code not in (0, None) and "with --config-dir FOLDER" in out + err
    assert not marker.exists() and not system and "necks" not in sys.modules

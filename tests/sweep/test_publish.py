"""What is printed and written when a sweep ends, from records that such a sweep would have left."""

import contextlib
import json
from pathlib import Path

import pytest
from hydra import initialize_config_dir

from fpn_ablate.engine import versions
from fpn_ablate.report import output
from fpn_ablate.report.collate.records import load
from fpn_ablate.report.formats import plots
from fpn_ablate.report.html import live
from fpn_ablate.runs import identity
from fpn_ablate.store import layout, plan
from fpn_ablate.sweep import publish
from fpn_ablate.utils.locks import lock
from fpn_ablate.utils.paths import CONF

CPU, GPU = "cpu (some processor)", "NVIDIA H100"
DAY = "2026-11-2{}T00:00:00+00:00"
FINGERPRINT = "0123456789abcdef"


@pytest.fixture
def cell(config, tmp_path, monkeypatch):
    """`cell("ablation=c4", "seed=1")` -> a Config that writes below the test's folder."""
    monkeypatch.setenv("COLUMNS", "200")

    def make(*overrides):
        return config(*overrides).model_copy(update={"out": str(tmp_path / "results")})

    return make


@pytest.fixture
def leave(tmp_path):
    """Write the record that a run of a cell would leave."""

    def write(cfg, value, setting, day=1, device=CPU, code=None, **changes):
        code = code or versions.core_version()
        folder = Path(cfg.out, "runs", cfg.table, cfg.recipe.name, cfg.row, f"seed{cfg.seed}-{setting}")
        record = {
            "format": 1, "status": "finished", "error": None, "fingerprint": f"{setting} {cfg.row} {cfg.seed}",
            "setting": setting, "code": code, "table": cfg.table, "recipe": cfg.recipe.name, "data": "shapes",
            "generated": True, "row": cfg.row, "seed": cfg.seed, "config": identity.portable(cfg), "deterministic": True,
            "metrics": {"AR100": value}, "environment": {"device": device}, "finished": DAY.format(day),
        }  # fmt: skip
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(json.dumps(record | changes))

    return write


def test_a_repeated_sweep_prints_its_own_setting_though_another_is_newer(cell, leave, capsys):
    for row in ("c4", "fpn"):
        leave(cell(f"ablation={row}"), 0.111, "mine", day=1)
        leave(cell(f"ablation={row}"), 0.222, "later", day=2, code="of a newer version")
    publish.publish([cell("ablation=c4"), cell("ablation=fpn")])
    out = capsys.readouterr().out
    assert "11.1" in out and "22.2" not in out
    assert "2 records of another setting: code of a newer version" in out


@pytest.mark.parametrize(("device", "shown"), [("cpu", "11.1"), ("cuda", "22.2")])
def test_a_sweep_prints_the_records_of_the_device_it_asks_for(cell, leave, capsys, device, shown):
    cfg = cell()
    leave(cfg, 0.111, "on a cpu", day=1, device=CPU)
    leave(cfg, 0.222, "on a gpu", day=2, device=GPU)
    leave(cell("seed=1"), 0.333, "on a third", day=3, device=CPU)
    publish.publish([cfg.model_copy(update={"device": device})])
    assert shown in capsys.readouterr().out


def test_the_newest_setting_stands_where_all_else_is_equal(cell, leave, capsys):
    leave(cell(), 0.222, "a", day=2)
    leave(cell(), 0.111, "b", day=1)
    leave(cell(), None, "c", day=3, status="failed")
    publish.publish([cell()])
    assert "22.2" in capsys.readouterr().out


@pytest.mark.parametrize(
    "cells",
    [
        [[f"ablation={row}"] for row in ("c4", "fpn", "finest")],
        [["factors=[neck,backbone]"], ["factors=[neck,backbone]", "backbone.freeze_at=3"]],
        [["factors=[backbone.freeze_at]"], ["factors=[backbone.freeze_at]", "backbone.freeze_at=3"]],
    ],
)
def test_leftovers_of_an_older_version_do_not_make_a_sweep_unfair(cell, leave, capsys, cells):
    """A sweep that was interrupted after its first row, and whose other rows ran before the last change of the code."""
    cells = [cell(*overrides) for overrides in cells]
    for cfg in cells:
        leave(cfg, 0.222, "old", code="of an older version")
    leave(cells[0], 0.111, "new", day=2)
    publish.publish(cells)
    out, err = capsys.readouterr()
    assert "11.1" in out and "22.2" not in out and not err


def test_a_row_that_sets_more_than_its_neck_is_refused_and_the_records_stay(cell, leave, capsys):
    fair = cell()
    rpn = fair.rpn.model_copy(update={"samples": 8})
    unfair = fair.model_copy(update={"row": "mine", "rpn": rpn})
    elsewhere = fair.model_copy(update={"table": "another"})
    for number, cfg in enumerate((fair, unfair, elsewhere)):
        leave(cfg, 0.5, f"setting{number}")
    publish.publish([fair, unfair, elsewhere])
    out, err = capsys.readouterr()
    assert err.startswith("error: table 'table1_rpn'") and "rpn.samples 8 against 256" in err
    assert "another · data shapes" in out
    assert len(load(Path(fair.out, "ledger.csv"))) == 3
    assert {path.stem for path in Path(fair.out, "tables").iterdir()} == {"another-shapes-smoke"}


def raising(*arguments, **named):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("broken", ["plot", "ledger", "show", "load"])
def test_a_failure_is_one_line_and_hides_neither_the_table_nor_the_sweeps_own_error(cell, leave, capsys, monkeypatch, broken):
    leave(cell(), 0.111, "a")
    if broken == "ledger":
        Path(cell().out, "ledger.csv").write_text("opened;in;a;spreadsheet\n")
    else:
        place = {"plot": (plots, "render"), "show": (publish, "show"), "load": (publish, "load")}[broken]
        monkeypatch.setattr(*place, raising)
    with pytest.raises(ZeroDivisionError):
        try:
            raise ZeroDivisionError
        finally:
            publish.publish([cell()])
    out, err = capsys.readouterr()
    assert err.startswith("warning: ") and err.count("\n") == 1
    assert ("spreadsheet" in err or "lacks the columns" in err) if broken == "ledger" else "No space left" in err
    assert ("11.1" in out) == (broken in ("plot", "ledger"))
    assert Path(cell().out, "tables", "table1_rpn-shapes-smoke.md").exists() == (broken != "load")


def test_what_is_added_while_records_are_read_is_in_the_next_tables(cell, leave, monkeypatch, capsys):
    """The state that tables are said to be of is the one before reading: afterwards they would be called as they were."""
    leave(cell(), 0.111, "a")

    def slow(runs):
        frame = load(runs)
        (file,) = Path(runs).rglob("record.json")
        file.write_text(file.read_text().replace("0.111", "0.222"))
        monkeypatch.setattr(publish, "load", load)
        return frame

    monkeypatch.setattr(publish, "load", slow)
    publish.publish([cell()])
    assert "11.1" in capsys.readouterr().out
    publish.publish([cell()])
    assert "up to date" not in capsys.readouterr().out
    assert "22.2" in Path(cell().out, "tables", "table1_rpn-shapes-smoke.md").read_text()
    publish.publish([cell()])
    assert "up to date" in capsys.readouterr().out


def test_a_table_is_shown_before_it_is_written(cell, leave, monkeypatch):
    done = []
    monkeypatch.setattr(publish, "show", lambda table, **how: done.append("shown"))
    monkeypatch.setattr(output, "save_table", lambda *arguments: done.append("written"))
    leave(cell(), 0.111, "a")
    publish.publish([cell()])
    assert done == ["shown", "written"]


def test_tables_of_a_further_configuration_folder_are_found(cell, leave, capsys, tmp_path):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "mine.yaml").write_text(
        "table: mine\nreport: {title: A title of mine, facts: [], metrics: [{key: AR100}]}\n"
    )
    cfg = cell().model_copy(update={"table": "mine"})
    leave(cfg, 0.111, "a")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        publish.publish([cfg])
    assert "A title of mine" in capsys.readouterr().out
    with initialize_config_dir(str(CONF), version_base="1.3"):
        publish.publish([cfg])
    assert "A title of mine" not in capsys.readouterr().out


def test_records_of_a_run_are_recognised_by_their_configuration(cell, leave):
    """Every key that decides something counts; places, threads and logging do not."""
    cfg = cell()
    leave(cfg, 0.1, "a")
    records = load(Path(cfg.out, "runs")).to_dict("records")
    same = cfg.model_copy(update={"threads": 3, "workers": 2, "log": cfg.log.model_copy(update={"every": 9})})
    other = cfg.model_copy(update={"neck": cfg.neck.model_copy(update={"smooth": "none"})})
    assert publish.settings_of([same], records) == {"a"}
    for different in (other, cfg.model_copy(update={"seed": 1}), cfg.model_copy(update={"table": "x"})):
        assert publish.settings_of([different], records) == set()


@pytest.fixture
def cells(config, tmp_path):
    """Two cells whose runs lie where `put` puts records."""
    chosen = [config("ablation=c4", "seed=2"), config("ablation=fpn", "seed=2")]
    return [cfg.model_copy(update={"out": str(tmp_path)}) for cfg in chosen]


def test_a_sweep_leaves_word_starts_its_page_and_ends_both(cells, put, runs, tmp_path, monkeypatch):
    monkeypatch.delenv(live.SWITCH, raising=False)
    monkeypatch.setattr(output, "save_table", lambda *_: None)
    started = []
    monkeypatch.setattr(live, "start", lambda out, experiments: started.append(out))
    put("c4", 2, recipe="smoke")
    publish.start_progress(cells)
    assert started == [tmp_path]
    assert [(cell.row, cell.recipe, cell.steps) for cell in plan.active_plans(runs)[0].cells] == [
        ("c4", "smoke", cells[0].steps),
        ("fpn", "smoke", cells[0].steps),
    ]
    publish.publish(cells)
    assert not plan.has_leftover_plan(runs)
    assert "<body data-reload=" not in (tmp_path / live.NAME).read_text()


def test_a_page_that_fails_is_one_warning(cells, put, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(live.SWITCH, raising=False)
    monkeypatch.setattr(output, "save_table", lambda *_: None)
    monkeypatch.setattr("fpn_ablate.report.html.page.render", lambda *_, **__: 1 / 0)
    put("c4", 2, recipe="smoke")
    publish.publish(cells)
    found = capsys.readouterr()
    assert "report.html is not written: division by zero" in found.err and (tmp_path / "ledger.csv").exists()


def write_status(cfg, status, code=None):
    """Write the record of a run of the cell."""
    file = layout.run_folder(cfg, FINGERPRINT) / "record.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"fingerprint": FINGERPRINT, "code": code or versions.core_version(), "status": status}
    file.write_text(json.dumps(content))
    return file


@pytest.mark.parametrize(
    ("status", "code", "locked", "after"),
    [
        ("running", None, False, "failed"),
        ("finished", None, False, "finished"),
        ("running", "of another version", False, "running"),
        ("running", None, True, "running"),  # another process is at it
    ],
)
def test_a_cell_whose_process_was_killed_for_good_says_so(cell, status, code, locked, after):
    cfg = cell()
    file = write_status(cfg, status, code)
    with lock(layout.run_lock(cfg.out, FINGERPRINT)) if locked else contextlib.nullcontext():
        publish.mark_killed(cfg, "WorkerKilled: twice")
    content = json.loads(file.read_text())
    assert (content["status"], content.get("error")) == (after, "WorkerKilled: twice" if after == "failed" else None)


def test_a_cell_that_ends_while_its_lock_is_waited_for_stays_finished(cell, monkeypatch):
    @contextlib.contextmanager
    def ends_just_before(*arguments, **options):
        write_status(cfg, "finished")
        yield

    monkeypatch.setattr(publish, "lock", ends_just_before)
    cfg = cell()
    file = write_status(cfg, "running")
    publish.mark_killed(cfg, "WorkerKilled: twice")
    assert json.loads(file.read_text())["status"] == "finished"

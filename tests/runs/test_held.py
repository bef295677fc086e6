"""Runs that another process works on, which a job of a sweep does not wait for, and what several rows build on."""

from pathlib import Path

import pytest
from settings import SHORT

from fpn_ablate.config.sources import sources
from fpn_ablate.engine import inputs, procedures
from fpn_ablate.runs import run as running
from fpn_ablate.runs.state import Run
from fpn_ablate.store import record
from fpn_ablate.store.layout import run_lock
from fpn_ablate.sweep.shared_sources import shared_sources
from fpn_ablate.utils import stamps
from fpn_ablate.utils.locks import Held, lock
from fpn_ablate.utils.paths import PROPOSALS

FAST = "task=fast_rcnn"


@pytest.fixture
def cell(config, tmp_path):
    def make(*overrides):
        return config(*SHORT, *overrides).model_copy(update={"out": str(tmp_path / "results")})

    return make


@pytest.fixture
def trainings(monkeypatch):
    """The tasks of the networks that are trained from now on."""
    trained, train = [], procedures.train
    monkeypatch.setattr(
        procedures, "train", lambda model, *rest, **named: trained.append(bool(model.rpn)) or train(model, *rest, **named)
    )
    return trained


def run_of(cfg):
    return Run(cfg, inputs.prepare(cfg), 0)


def test_a_run_or_a_source_that_another_process_works_on_is_not_waited_for(cell, trainings):
    cfg = cell(FAST)
    run, source = run_of(cfg), run_of(sources(cfg)["rpn"])
    for held, title in ((run, run.title), (source, source.title)):
        path = run_lock(cfg.out, held.fingerprint)
        with lock(path), pytest.raises(Held, match=f"{title}: another row or process is working on it") as problem:
            running.run(cfg, wait=False)
        assert problem.value.path == path
    with lock(run_lock(cfg.out, source.fingerprint)), pytest.raises(Held):
        running.run_sources(cfg)
    assert record.read(run.folder)["status"] == "interrupted"  # it had begun, and nothing has failed
    assert not trainings
    running.run_sources(cfg)
    cache = source.folder / f".{PROPOSALS}.lock"
    (source.folder / PROPOSALS).unlink()
    with lock(cache), pytest.raises(Held, match=PROPOSALS):
        running.run(cfg, wait=False)
    assert running.run(cfg, wait=False)["status"] == "finished"
    assert trainings == [True, False]


def test_a_pretraining_is_waited_for_by_the_job_that_makes_what_rows_build_on(cell, monkeypatch):
    """For a row it may be hours away; that job would otherwise end, and its rows each begin with it."""
    cfg, asked = cell("backbone.weights=pretrain", "recipe.pretrain.steps=1"), []

    class Asked(Exception):
        pass

    def held(*arguments, wait, report):
        asked.append(wait)
        raise Asked

    monkeypatch.setattr(inputs, "load_or_pretrain", held)
    for start in (running.run_sources, running.run, lambda cfg: running.run(cfg, wait=False)):
        with pytest.raises(Asked):
            start(cfg)
    assert asked == [True, True, False]
    monkeypatch.undo()
    running.run_sources(cfg)
    (weights,) = Path(cfg.out, "backbones").glob("*.pt")
    with lock(weights.with_name(f"{weights.name}.lock")), pytest.raises(Held, match="pre-training"):
        running.run(cfg, wait=False)


def chosen(*cells):
    stamps.stamp_of.cache_clear()  # as in another process
    return shared_sources(dict(enumerate(cells, start=5)))


def test_what_several_rows_build_on_is_one_job_until_it_is_made(cell, trainings, monkeypatch):
    monkeypatch.setattr(running.skip, "is_recent", lambda *_: False)  # files that the test has just made
    rows = [cell(FAST, f"ablation={row}") for row in ("c4", "fpn", "bottom_up")]
    others = [cell(FAST, f"ablation={row}", "seed=1") for row in ("c4", "fpn")]
    separate = [cell("task=faster_rcnn", "task.training=separate", f"ablation={row}") for row in ("c4", "c5")]
    assert chosen(*rows, *others) == [5, 8]
    assert chosen(*separate, rows[0]) == chosen(rows[0]) == []  # each builds on an RPN of its own
    assert chosen(rows[0], *separate, cell("task=faster_rcnn", "task.training=separate", "ablation=fpn")) == [5]
    running.run_sources(rows[1])
    assert trainings == [True]
    assert chosen(*rows, *others) == [8]
    (proposals,) = Path(rows[0].out).rglob(PROPOSALS)
    proposals.unlink()
    assert chosen(*rows, *others) == [5, 8]
    running.run_sources(rows[0])
    assert trainings == [True] and proposals.exists() and chosen(*rows) == []


def test_rows_that_share_a_pretraining_have_one_job_that_makes_it_with_their_sources(cell):
    rows = [cell(task, "backbone.weights=pretrain", f"ablation={row}") for task in ("task=rpn", FAST) for row in ("c4", "fpn")]
    assert chosen(*rows) == [7]
    assert chosen(*rows[:2]) == [5]
    assert chosen(*rows[2:]) == [5]
    weights = Path(rows[0].out, "backbones", f"{rows[0].backbone.label}-0123456789ab.pt")
    weights.parent.mkdir(parents=True)
    weights.touch()
    assert chosen(*rows[:2]) == [] and chosen(*rows) == [7]

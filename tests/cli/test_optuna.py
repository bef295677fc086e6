"""Searches with Optuna, and sweeps by a sweeper that is not ours; nothing is trained."""

import math
import re
import sys
from pathlib import Path

import pytest

from fpn_ablate.runs import run as running
from fpn_ablate.sweep import publish
from fpn_ablate.sweep.objective import objective

pytest.importorskip("optuna", reason='Optuna is not installed: pip install "fpn-ablate[optuna]"')
import recording_sampler

LR = "recipe.optimizer.lr=tag(log,interval(1e-4,1e-1))"
SEARCH = ("-m", "recipe=smoke", "device=cpu", "jobs=1", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", LR)
BEST = 3e-3  # the rate at which `figure` is highest


def figure(cfg):
    """What a run finds: a fraction that falls with the distance from BEST, and by a tenth from seed to seed."""
    return 0.9 - 0.2 * abs(math.log10(cfg.recipe.optimizer.lr / BEST)) - 0.1 * cfg.seed


@pytest.fixture
def trained(monkeypatch):
    """The cells that were run, in their order."""
    cells = []

    def run(cfg, job=0, wait=True):
        cells.append(cfg)
        return {"metrics": {"AR100": figure(cfg), "AR1k": 0.5}, "fingerprint": "0" * 16}

    monkeypatch.setattr(running, "run", run)
    return cells


@pytest.fixture
def published(monkeypatch):
    calls = []
    monkeypatch.setattr(publish, "_publish", lambda cells, out, printed, single: calls.append((cells, printed)))
    return calls


def rates(cells):
    return [cfg.recipe.optimizer.lr for cfg in cells]


def test_a_search_shows_its_best_trial_and_writes_that_table_alone(cli, trained, published):
    code, out, err = cli(*SEARCH)
    assert code == 0 and len(trained) == 3, out + err
    assert all(1e-4 <= rate <= 1e-1 for rate in rates(trained)) and len(set(rates(trained))) == 3
    assert {cfg.recipe.name for cfg in trained} == {f"smoke+optimizer.lr={rate:.4g}" for rate in rates(trained)}
    best = max(trained, key=figure)
    lines = out.splitlines()
    assert (
        lines[-1]
        == f"best trial: python -m fpn_ablate recipe=smoke device=cpu jobs=1 recipe.optimizer.lr={rates([best])[0]:.4g}"
    )
    assert "3 trials of 3 finished" in lines[-2] and "AR@100" in out
    shown = [float(line.split()[1]) for line in lines if re.match(r"\s+\d", line)]
    assert shown == sorted((round(100 * figure(cfg), 2) for cfg in trained), reverse=True)  # in the table's unit
    assert published == [([best], False)]

    once = rates(trained)
    cli(*SEARCH)
    assert rates(trained)[3:] == once  # so that finished runs are found again


def test_each_trial_has_all_seeds_and_counts_by_their_mean(cli, trained, published):
    told = recording_sampler.TOLD
    told.clear()
    sampler = "hydra.sweeper.sampler._target_=recording_sampler.RecordingSampler"
    code, out, _ = cli(*SEARCH, "hydra.sweeper.n_trials=2", "seed=0,2", "ablation=fpn,c4", sampler)
    assert code == 0 and [cfg.seed for cfg in trained] == [0, 2] * 2
    for pair in (trained[:2], trained[2:]):
        assert len({(cfg.row, cfg.recipe.name) for cfg in pair}) == 1
        mean = 50 * (figure(pair[0]) + figure(pair[1]))
        assert f" {mean:.2f} " in out and told.pop(0) == pytest.approx(mean)
    assert re.search(r"best trial: python -m fpn_ablate -m .*ablation=(fpn|c4) .*seed=0,2$", out.strip())


def test_a_failed_trial_ends_the_search_only_where_that_is_asked_for(cli, trained, published, monkeypatch):
    run = running.run

    def fail_once(cfg, job, wait):
        record = run(cfg, job, wait)
        if len(trained) == 2:
            raise ValueError("too high a rate")
        return record

    monkeypatch.setattr(running, "run", fail_once)
    recording_sampler.TOLD.clear()
    code, out, err = cli(*SEARCH, "hydra.sweeper.sampler._target_=recording_sampler.RecordingSampler")
    assert code == 1 and len(trained) == 3 and "too high a rate" in err and recording_sampler.TOLD[1] is None
    assert "2 trials of 3 finished, 1 did not" in out
    trained.clear()
    code, out, _ = cli(*SEARCH, "on_failure=stop")
    assert code == 1 and len(trained) == 2 and "1 trials of 3 finished, 1 did not" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([f"~{LR.partition('=')[0]}", "recipe.optimizer.lr=0.1"], "no key has several values; give one an interval or a list"),
        (["objective=AP"], "objective=AP: table1_rpn has no such column; it has AR100, AR1k, AR1k_s, AR1k_m, AR1k_l"),
        (["hydra.sweeper.direction=up"], "hydra.sweeper: "),
        (["hydra.sweeper.sampler._target_=optuna.samplers.Nope"], "hydra.sweeper: "),
        (["recipe.optimizer.momentum=tag(log,interval(0.0,1.0))"], "momentum=tag(log,interval(0.0,1.0)): "),
        (["recipe.optimizer.momentum=interval(2.0,3.0)"], "recipe.optimizer.momentum=2."),
    ],
)
def test_a_search_that_cannot_be_made_is_refused_before_anything_is_trained(cli, trained, arguments, message):
    code, out, err = cli(*SEARCH[:-1], *([] if arguments[0].startswith("~") else [LR]), *arguments[-1:])
    assert code == 2 and message in out + err and "Traceback" not in out + err and not trained


def test_without_optuna_the_message_says_what_to_install(cli, trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    code, _, err = cli(*SEARCH)
    assert code == 2 and 'pip install "fpn-ablate[optuna]"' in err


def test_an_objective_may_be_any_column_of_the_table(config):
    record = {"metrics": {"AP50": 0.5, "AP": 0.25}, "cost": {"latency_ms": 12.0}}
    for key, value in {"AP": 25.0, "AP50": 50.0, "latency": 12.0}.items():
        assert objective(config("task=faster_rcnn", f"objective={key}"), record) == value
    assert objective(config("task=faster_rcnn"), record) == 50.0  # the first
    assert objective(config("objective=AR1k_l"), {"metrics": {"AR100": 0.5, "AR1k_l": None}}) is None
    assert objective(config("table=own", "objective=b"), {"metrics": {"a": 0.1, "b": 0.2}}) == 20.0


def test_the_sweep_of_another_sweeper_ends_with_its_tables(cli, trained, published, monkeypatch):
    """Also if a row fails; its jobs wait for another process's lock, since nobody would launch them again."""
    waited = []

    def run(cfg, job, wait):
        waited.append(wait)
        folder = Path(cfg.out, "runs", cfg.table, cfg.recipe.name, cfg.row, "seed0-0")
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(cfg.model_dump_json())
        (folder / "record.json").write_text("{}")
        raise ValueError("no")

    monkeypatch.setattr(running, "run", run)
    code, _, err = cli("-m", "recipe=smoke", "ablation=c4,fpn", "hydra/sweeper=basic")
    assert code == 1 and "no" in err and waited == [True, True]
    ((cells, printed),) = published
    assert printed and sorted(cfg.row for cfg in cells) == ["c4", "fpn"]
    cli("-m", "recipe=smoke", "ablation=c4,fpn", "out=elsewhere", "jobs=1")
    assert waited[2:] == [False, False] and len(published) == 2

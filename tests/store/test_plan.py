"""Plans of sweeps: whose they are, and when they are over."""

import json

import pytest
from planned_sweep import planned_sweep

from fpn_ablate.store import plan
from fpn_ablate.utils.locks import lock

PLANNED = [plan.PlannedRun("table1_rpn", "quick", "shapes", row, seed, 500) for row in ("c4", "fpn") for seed in (2, 3)]


@pytest.fixture
def sweep(runs):
    """Another process, with a plan of its own."""
    with planned_sweep(runs, [plan.PlannedRun("table1_rpn", "quick", "shapes", "c5", 0, 500)]) as process:
        yield process


def rows(runs, **how):
    return sorted(cell.row for found in plan.active_plans(runs, **how) for cell in found.cells)


def test_a_plan_is_active_while_its_process_lives(runs, sweep):
    assert rows(runs) == rows(runs, this_host=True) == ["c5"]
    sweep.kill()
    sweep.wait()
    assert plan.active_plans(runs) == []
    assert plan.has_leftover_plan(runs)


def test_the_end_takes_a_plan_away_and_the_next_sweep_those_of_the_dead(runs, sweep):
    plan.write_plan(runs, PLANNED)
    assert rows(runs) == ["c4", "c4", "c5", "fpn", "fpn"]
    plan.remove_plan(runs)
    plan.remove_plan(runs)
    assert rows(runs) == ["c5"]  # another's stays
    sweep.kill()
    sweep.wait()
    file = plan.write_plan(runs, PLANNED)
    assert sorted((runs / plan.PLANS).iterdir()) == [file, file.with_suffix(".lock")]
    plan.remove_plan(runs)
    assert not plan.has_leftover_plan(runs)


def test_a_plan_of_another_machine_is_active_while_its_lock_is_held(runs):
    file = plan.write_plan(runs, PLANNED)
    other = file.rename(file.with_name(f"x{file.name}"))
    with lock(other.with_suffix(".lock")):
        assert len(plan.active_plans(runs)) == 1
        assert plan.active_plans(runs, this_host=True) == []
    assert plan.active_plans(runs) == []
    plan.remove_plan(runs)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"cells": [1]}', '{"cells": []}'])
def test_a_damaged_plan_is_none(runs, content):
    plan.write_plan(runs, PLANNED).write_text(content)
    assert plan.active_plans(runs) == []


@pytest.mark.parametrize(
    "change",
    [
        *({"started": text} for text in ("2026-11-21T08:00:00", "yesterday", 3, None)),
        *({"code": 1}, {"command": None}, {"cells": None}, {"cells": {}}, {"cells": ["c4"]}, {"more": 1}),
    ],
)
def test_a_plan_with_a_value_of_another_kind_is_none(runs, change):
    file = plan.write_plan(runs, PLANNED)
    assert len(plan.active_plans(runs)) == 1
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert plan.active_plans(runs) == []
    plan.remove_plan(runs)


@pytest.mark.parametrize(
    "change", [{"row": ["fpn"]}, {"row": {}}, {"table": None}, {"seed": "2"}, {"seed": 2.5}, {"seed": True}, {"steps": 10**400}]
)
def test_a_plan_with_a_cell_of_another_kind_is_none(runs, change):
    file = plan.write_plan(runs, PLANNED)
    content = json.loads(file.read_text())
    content["cells"][-1] |= change
    file.write_text(json.dumps(content))
    assert plan.active_plans(runs) == []
    plan.remove_plan(runs)

"""Estimates of how long a run takes, from the records of finished ones."""

import pytest

from fpn_ablate.store import record
from fpn_ablate.store.layout import row_folder
from fpn_ablate.store.pace import Pace, expected_pace

TIMES = {"steps": 100, "train_s": 50.0, "eval_s": 5.0, "pretrain_s": 0.0, "proposals_s": 0.0}


@pytest.fixture
def finished(config, tmp_path):
    cfg = config("recipe=quick").model_copy(update={"out": str(tmp_path)})

    def write(name, cost):
        record.write(row_folder(cfg) / name, {"status": "finished", "data": cfg.data_name, "cost": cost})
        return cfg

    return write


def test_a_run_that_went_on_counts_the_steps_from_there(finished):
    assert expected_pace(finished("a", TIMES | {"resumed_at": 50})) == Pace(1.0, 15.0)


@pytest.mark.parametrize("cost", [[1], None, TIMES | {"steps": "x"}, TIMES | {"steps": None}, TIMES | {"resumed_at": "x"}, {}])
def test_a_damaged_record_is_left_out(finished, cost):
    cfg = finished("damaged", cost)
    assert expected_pace(cfg) == Pace(0.19, 20.0), "as measured"
    finished("sound", TIMES)
    assert expected_pace(cfg) == Pace(0.5, 15.0)

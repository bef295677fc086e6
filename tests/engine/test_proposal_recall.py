"""task.proposal_recall: the recall of a detector's proposals beside its precision, from one network."""

import numpy as np
import pytest
from settings import JOINT, TINY

from fpn_ablate.config.sources import sources
from fpn_ablate.engine.evaluate import evaluate, propose
from fpn_ablate.evaluation.coco import DetectionSet
from fpn_ablate.runs import run as running
from fpn_ablate.runs.remake import remake_artifacts
from fpn_ablate.runs.restore import load_finished, restore
from fpn_ablate.store import record
from fpn_ablate.store.layout import run_folder
from fpn_ablate.utils.errors import UserError

RECALL = {f"proposal_AR{k}{size}" for k in ("100", "1k") for size in ("", "_s", "_m", "_l")}
# The second stage reads 4 proposals, and the RPN leaves 50.
TASK = (*TINY, *JOINT, "recipe.roi.steps=2", "task.roi.proposals=[8,4]", "rpn.post_nms_topk=[60,50]")


@pytest.fixture(autouse=True)
def no_measurements(monkeypatch):
    """As in test_procedures.py."""
    monkeypatch.setattr(running, "end_to_end_latency_ms", lambda *_: 1.0)
    monkeypatch.setattr(running, "end_to_end_memory_mib", lambda *_: 1)
    monkeypatch.setattr(running, "reset_peak_memory", lambda *_: None)


def test_a_two_stage_row_is_evaluated_as_a_proposer_on_all_that_its_rpn_leaves(config, tmp_path):
    cfg = config(*TASK, "task.proposal_recall=true").model_copy(update={"out": str(tmp_path / "results")})
    outcome = running.run(cfg)
    assert outcome["metrics"].keys() >= RECALL | {"AP", "AR100"}
    folder = run_folder(cfg, outcome["fingerprint"])
    saved = DetectionSet.load(folder / "proposed.npz")
    trained, _, device = restore(folder)
    again = propose(trained.model, trained.validation, cfg.recipe, device, count=2)
    assert len(saved.boxes) > 2 * 4 and saved.labels is None
    np.testing.assert_array_equal(saved.boxes, again.boxes)
    _, _, (_, validation) = load_finished(folder)
    for name, value in evaluate(saved, validation, 2)["metrics"].items():
        assert outcome["metrics"][f"proposal_{name}"] == value

    replicates = np.load(folder / "resampled.npz")["resampled"]
    assert set(replicates.dtype.names) >= RECALL | {"AP"}
    (folder / "resampled.npz").unlink()
    remake_artifacts(folder)
    np.testing.assert_array_equal(np.load(folder / "resampled.npz")["resampled"], replicates)
    assert record.read(folder)["metrics"] == outcome["metrics"]


def test_without_it_nothing_is_proposed_twice(config, tmp_path):
    cfg = config(*TASK).model_copy(update={"out": str(tmp_path / "results")})
    outcome = running.run(cfg)
    assert not outcome["metrics"].keys() & RECALL
    assert not (run_folder(cfg, outcome["fingerprint"]) / "proposed.npz").exists()


def test_two_networks_are_refused_and_a_step_of_four_is_another_tables_run(config):
    with pytest.raises(UserError, match="with training=separate the RPN is another"):
        config("task=faster_rcnn", "task.proposal_recall=true")
    four = ("task=faster_rcnn", "task.training=four_step")
    with_recall, without = (sources(config(*four, *more))["second"] for more in (("task.proposal_recall=true",), ()))
    assert with_recall.task == without.task

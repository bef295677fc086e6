"""What a run reads before it trains."""

import torch
from coco_sets import base, write

from fpn_ablate.data.coco import CocoDataset
from fpn_ablate.engine.inputs import Inputs


def test_training_on_the_evaluated_split_is_seen_by_content_and_by_files(tmp_path):
    first, copy = (CocoDataset(*write(tmp_path / name, base()), "set") for name in ("first", "copy"))
    with_objects = CocoDataset(*write(tmp_path / "first", base()), "set", keep_empty=False)
    other = CocoDataset(*write(tmp_path / "other", base() | {"annotations": base()["annotations"][:2]}), "set")
    cpu = torch.device("cpu")
    found = [Inputs(cpu, training, first).trains_on_validation for training in (first, copy, with_objects, other)]
    assert found == [True, True, True, False]

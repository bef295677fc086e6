"""What a run sets before it trains: how exact and repeatable a GPU is, and batches that it reads while the host goes on."""

import pytest
import torch
from settings import JOINT
from torch.utils.data._utils.pin_memory import pin_memory

from fpn_ablate.engine import inputs
from fpn_ablate.structures.batch import Batch
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.seeding import set_deterministic

POOL = ("task.roi.pooling=pool", "deterministic=true")


@pytest.mark.parametrize("task", [("task=fast_rcnn",), ("task=faster_rcnn",), JOINT])
def test_roi_pool_cannot_be_deterministic_on_a_gpu_and_that_is_said_before_anything_is_read(config, monkeypatch, task):
    monkeypatch.setattr(inputs, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(inputs, "load_data", lambda *_: pytest.fail("data was read"))
    with pytest.raises(UserError, match=r"deterministic=true with task.roi.pooling=pool.*Set task.roi.pooling=align"):
        inputs.prepare(config(*task, *POOL))


@pytest.mark.parametrize(
    ("device", "overrides"),
    [
        ("cpu", (*JOINT, *POOL)),
        ("cuda", (*JOINT, "task.roi.pooling=pool", "deterministic=auto")),
        ("cuda", (*JOINT, "task.roi.pooling=align", "deterministic=true")),
        ("cuda", ("deterministic=true",)),
    ],
)
def test_what_repeats_or_need_not_is_not_refused(config, device, overrides):
    cfg, where = config(*overrides), torch.device(device)
    inputs.refuse_random_order(cfg, where, inputs.is_deterministic(cfg.deterministic, where))


def test_cudnn_times_its_algorithms_where_shapes_are_fixed_alone():
    found = []
    for enabled, fixed_shapes in ((False, True), (False, False), (True, True)):
        set_deterministic(enabled, fixed_shapes)
        found.append(torch.backends.cudnn.benchmark)
    set_deterministic(False)
    assert found == [True, False, False]


def test_torchs_loader_pins_every_tensor_of_a_batch(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x, *_: pinned.append(x) or x.clone())
    boxes, mask = torch.rand(2, 3, 4), torch.rand(2, 3) < 0.5
    batch = Batch(torch.rand(2, 3, 8, 8), torch.full((2, 2), 8), boxes, mask.long(), mask, ~mask, [5, 7])
    copy = pin_memory(batch)
    assert len(pinned) == 6 and copy.image_ids == [5, 7] and copy.proposals is None
    assert torch.equal(copy.boxes, batch.boxes) and copy.boxes is not batch.boxes

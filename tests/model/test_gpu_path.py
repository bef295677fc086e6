"""What a GPU runs, checked on a CPU: devices and dtypes of all rows and tasks by fake tensors, and how often a step waits."""

import contextlib
from unittest.mock import patch

import pytest
import torch
from settings import JOINT, ROWS, SCRATCH
from torch._subclasses.fake_tensor import FakeTensorMode
from waits import Waits

from fpn_ablate.engine.optim import build_optimizer
from fpn_ablate.model.build import build_detector
from fpn_ablate.model.init import initialise
from fpn_ablate.model.ops import sparse_conv
from fpn_ablate.model.optimise import optimise
from fpn_ablate.structures.instances import Proposals, Targets
from fpn_ablate.utils.seeding import torch_generator

CUDA = torch.device("cuda")
TASKS = {"rpn": (), "fast_rcnn": ("task=fast_rcnn",), "joint": JOINT}
FP32 = {(torch.float32, "cuda")}


def facts(tensors):
    return {(x.dtype, x.device.type) for x in tensors}


@pytest.fixture
def fake_gpu():
    """Tensors on `cuda` with shapes alone. torch asks whether there is a GPU before it lets autocast run."""
    sparse_conv._sizes.cache_clear()
    with contextlib.ExitStack() as stack:
        for name, answer in (("amp.common.amp_definitely_not_available", False), ("is_bf16_supported", True)):
            stack.enter_context(patch(f"torch.cuda.{name}", lambda *_, answer=answer: answer))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(torch.device("cuda"))
        yield
    sparse_conv._sizes.cache_clear()


@pytest.mark.parametrize(("row", "is_fast"), [*((row, True) for row in ROWS), ("fpn", False)])
@pytest.mark.parametrize("task", TASKS)
def test_every_row_and_task_runs_on_the_gpu_and_its_losses_are_fp32(config, fake_gpu, task, row, is_fast):
    """No tensor is on another device, and bf16 ends at the heads. Operators whose sizes depend on values are left out."""
    model = build_detector(config(f"ablation={row}", *TASKS[task]), num_classes=3).train()
    model = optimise(model, CUDA) if is_fast else model
    images, boxes = torch.empty(2, 3, 64, 96, dtype=torch.uint8), torch.empty(2, 3, 4)
    valid = torch.ones(2, 3, dtype=torch.bool)
    targets = Targets(boxes, valid.long(), valid, ~valid, torch.empty(2, 2, dtype=torch.int64))
    proposals = Proposals(torch.empty(2, 30, 4), torch.empty(2, 30), torch.ones(2, 30, dtype=torch.bool))
    generator = torch.Generator("cpu")  # there is no other here
    with torch.autocast("cuda", torch.bfloat16):
        features = model.features(images, targets.sizes)
        assert {device for _, device in facts(features.values())} == {"cuda"}
        assert not is_fast or facts(features.values()) == {(torch.bfloat16, "cuda")}  # a plain frozen batch norm is fp32
        if model.rpn:
            objectness, deltas, anchors = model.rpn(features)
            assert facts([*objectness, *deltas, *anchors]) == FP32
            assert facts(model.rpn.losses(features, targets, generator).values()) == FP32
        if model.roi:
            rois, labels, matched_idxs, sampled_mask = model.roi.sample(proposals, targets, generator)
            size = len(rois.flatten(0, 1)), model.roi.pooler.in_channels, *[model.roi.pooler.resolution] * 2
            with patch.object(
                type(model.roi.pooler), "pool", lambda *_: torch.empty(size)
            ):  # how many RoIs a level has: values
                scores, deltas = model.roi(features, rois)
            losses = model.roi.losses_of(scores, deltas, rois, labels, matched_idxs, sampled_mask, boxes)
            assert facts([scores, deltas, *losses.values()]) == FP32


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), {}),
        (("task=fast_rcnn",), {"tolist": 1}),
        (JOINT, {"nms": 16, "tolist": 2}),
        ((*JOINT, "ablation=c4"), {"nms": 16, "tolist": 1}),
    ],
)
def test_how_often_the_host_waits_in_a_training_step_of_16_images(config, overrides, expected):
    """For one NMS an image, once for the number of boxes that are left, and once for the number of RoIs of each level."""
    cfg = config(*SCRATCH, *overrides, *(("task.roi.samples=16",) if overrides else ()))
    model = build_detector(cfg, num_classes=3)
    initialise(model, 0)
    optimise(model, CUDA).train()
    optimizer = build_optimizer(model, cfg.recipe.optimizer)
    images = torch.randint(0, 256, (16, 3, 64, 64), generator=torch_generator(0), dtype=torch.uint8)
    boxes, valid = torch.tensor([[8.0, 8, 40, 50]]).expand(16, 1, 4), torch.ones(16, 1, dtype=torch.bool)
    targets = Targets(boxes, valid.long(), valid, ~valid, torch.full((16, 2), 64))
    near = boxes + torch.arange(20)[:, None] / 2
    proposals = None if model.rpn else Proposals(near, near[..., 0], torch.ones(16, 20, dtype=torch.bool))

    def step():
        losses = model.losses(images, targets, lambda purpose: torch_generator(0, purpose), proposals)
        sum(losses.values()).backward()
        optimizer.step()

    step()  # the first makes anchors, constants and the optimiser's state
    with Waits() as waits:
        step()
    assert waits.by_name == expected

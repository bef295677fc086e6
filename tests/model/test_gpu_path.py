"""What a GPU runs, checked on a CPU: devices and dtypes of all rows and tasks by fake tensors, and how often a step waits."""

import subprocess
import sys

import fake_gpu
import pytest
import torch
from settings import JOINT, SCRATCH
from waits import Waits

from fpn_ablate.engine.optim import build_optimizer
from fpn_ablate.model import matching
from fpn_ablate.model.build import build_detector
from fpn_ablate.model.init import initialise
from fpn_ablate.model.optimise import optimise
from fpn_ablate.structures.instances import Proposals, Targets
from fpn_ablate.utils.seeding import torch_generator

CUDA = torch.device("cuda")


def test_every_row_and_task_runs_on_the_gpu_and_its_losses_are_fp32():
    done = subprocess.run([sys.executable, fake_gpu.__file__], capture_output=True, text=True)
    cells = done.stdout.splitlines()
    assert done.returncode == 0, f"{cells[-1]}: {done.stderr[-2000:]}"
    assert len(cells) == 9


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), {}),
        (("task=fast_rcnn",), {"tolist": 1}),
        (JOINT, {"nms": 16, "tolist": 2}),
        pytest.param((*JOINT, "ablation=c4"), {"nms": 16, "tolist": 1}, marks=pytest.mark.slow),
    ],
)
def test_how_often_the_host_waits_in_a_training_step_of_16_images(config, monkeypatch, overrides, expected):
    """For one NMS an image, once for the number of boxes that are left, and once for the number of RoIs of each level."""
    monkeypatch.setattr(matching, "perhaps_any", lambda mask: True)  # as on a GPU
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

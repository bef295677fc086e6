"""Check on a GPU what a CPU cannot show: runs on CUDA, repeatability, bf16, and how often a step waits."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from settings import JOINT, ROWS, SCRATCH

from fpn_ablate.engine.optim import build_optimizer
from fpn_ablate.model.build import build_detector
from fpn_ablate.model.init import initialise
from fpn_ablate.model.necks.upsample import bilinear
from fpn_ablate.model.optimise import optimise
from fpn_ablate.runs import run as running
from fpn_ablate.structures.batch import Batch
from fpn_ablate.structures.instances import Targets, map_tensors
from fpn_ablate.utils.seeding import torch_generator

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
GPU = (*SCRATCH, "device=cuda")
TASKS = {
    "fast_rcnn": ("task=fast_rcnn",),
    "joint": JOINT,
    "joint_in_bf16": (*JOINT, "recipe.bf16=true"),
    "masks": ("task=mask_rcnn", "task.training=joint"),
    "segments": ("task=segment_proposals",),
    "retinanet": ("task=retinanet",),
    **{name: (f"task={name}",) for name in ("fcos", "yolo", "ssd")},
    **{name: ("task=faster_rcnn", f"task.training={name}") for name in ("separate", "four_step")},
}


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 128, 128), generator=generator, dtype=torch.uint8).cuda()
    gt = torch.tensor([[[10.0, 10, 40, 50], [60, 60, 120, 110]], [[30.0, 5, 60, 30], [0, 0, 0, 0]]]).cuda()
    valid = torch.tensor([[True, True], [True, False]]).cuda()
    return images, Targets(gt, valid.long(), valid, torch.zeros_like(valid), torch.tensor([[128, 128], [128, 100]]).cuda())


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize(("workers", "bf16"), [(0, "false"), (2, "true")])
def test_a_smoke_row_runs_on_the_gpu(config, measured, tmp_path, row, workers, bf16):
    cfg = config(f"ablation={row}", f"recipe.bf16={bf16}", *GPU)
    outcome = running.run(cfg.model_copy(update={"out": str(tmp_path), "workers": workers}))
    assert outcome["status"] == "finished"
    assert outcome["environment"]["device"] == torch.cuda.get_device_name(0)
    assert outcome["cost"]["peak_memory_mib"] > 0


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("task", TASKS)
def test_a_smoke_row_of_every_task_runs_on_the_gpu(config, measured, tmp_path, task, row):
    cfg = config(f"ablation={row}", *TASKS[task], *GPU)
    outcome = running.run(cfg.model_copy(update={"out": str(tmp_path)}))
    assert outcome["status"] == "finished"
    assert outcome["cost"]["latency_ms"] > 0


def test_batches_of_training_and_evaluation_are_pinned(config, tmp_path, monkeypatch):
    to, pinned = Batch.to, []

    def recorded(batch, device):
        pinned.extend(x.is_pinned() for x in vars(batch).values() if isinstance(x, torch.Tensor))
        return to(batch, device)

    monkeypatch.setattr(Batch, "to", recorded)
    running.run(config(*GPU).model_copy(update={"out": str(tmp_path)}))
    assert pinned and all(pinned)


REPEATED = [
    *((f"neck.upsample={mode}",) for mode in ("nearest", "bilinear", "deconv")),
    (*JOINT, "deterministic=true"),
    ("task=ssd", "deterministic=true"),
]


@pytest.mark.parametrize("overrides", REPEATED)
def test_the_same_run_twice_is_the_same_bit_for_bit(config, tmp_path, overrides):
    cfg = config(*overrides, *GPU)
    states = []
    for attempt in ("a", "b"):
        running.run(cfg.model_copy(update={"out": str(tmp_path / attempt)}))
        (path,) = (tmp_path / attempt).rglob("model.pt")
        states.append(torch.load(path, weights_only=True, map_location="cpu"))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_bilinear_is_the_librarys_and_repeats_in_either_mode():
    x = torch.rand(2, 8, 13, 17, device="cuda", requires_grad=True)
    grads = []
    for _ in range(2):
        out = bilinear(x, (26, 33))
        torch.testing.assert_close(out, F.interpolate(x, (26, 33), mode="bilinear"), rtol=1e-4, atol=1e-4)
        grads.append(torch.autograd.grad(out.square().sum(), x)[0])
    assert torch.equal(*grads)


def fast(cfg):
    model = build_detector(cfg)
    initialise(model, 0)
    return optimise(model.cuda(), torch.device("cuda"))


def test_bf16_is_close_to_fp32_and_losses_and_boxes_are_fp32(config, batch):
    model, (images, targets) = fast(config()), batch
    results = {}
    for enabled in (False, True):
        with torch.autocast("cuda", torch.bfloat16, enabled=enabled):
            losses = model.losses(images, targets, lambda purpose: torch_generator(0, purpose, device="cuda"))
            proposals = model.eval().propose(images, targets.sizes)
        assert {v.dtype for v in losses.values()} == {proposals.boxes.dtype} == {torch.float32}
        results[enabled] = {name: float(v.detach()) for name, v in losses.items()}, proposals
    for name, value in results[False][0].items():
        assert results[True][0][name] == pytest.approx(value, rel=0.05), name
    best = [results[enabled][1].scores[:, :20].mean() for enabled in (False, True)]
    assert float(best[0]) == pytest.approx(float(best[1]), abs=0.02)


@pytest.mark.parametrize("is_fast", [False, True])
def test_the_gpu_computes_what_the_cpu_computes(config, batch, monkeypatch, is_fast):
    model = build_detector(config())
    initialise(model, 0)
    images, targets = batch
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    on_cpu = model.eval().propose(images.cpu(), targets.sizes.cpu())
    on_gpu = (optimise(model.cuda(), images.device) if is_fast else model.cuda()).propose(images, targets.sizes)
    torch.testing.assert_close(on_gpu.scores[:, :50].cpu(), on_cpu.scores[:, :50], rtol=1e-3, atol=1e-3)


def test_generators_live_on_their_device():
    a, b = (torch.rand(8, generator=torch_generator(0, "x", device="cuda"), device="cuda") for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(a, torch.rand(8, generator=torch_generator(1, "x", device="cuda"), device="cuda"))


@pytest.mark.parametrize(("overrides", "most"), [((), 0), (JOINT, 20)])
def test_how_often_a_training_step_of_16_images_waits_for_the_gpu(config, batch, overrides, most):
    """Forward, backward and optimiser: `engine.train` reads a loss only to log or save.

    A second stage waits: only the GPU knows how many boxes NMS keeps, and how many RoIs each level gets.
    """
    cfg = config(*overrides)
    model, images = fast(cfg).train(), batch[0].repeat(8, 1, 1, 1)
    targets = map_tensors(batch[1], lambda x: x.repeat(8, *[1] * (x.dim() - 1)))
    optimizer, draw = build_optimizer(model, cfg.recipe.optimizer), torch_generator(0, "sampling", device="cuda")

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            losses = model.losses(images, targets, lambda purpose: draw)
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()

    step()  # the first makes anchors, constants and the optimiser's state
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchronizing CUDA operation" in str(warning.message) for warning in caught) <= most

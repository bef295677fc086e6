"""Pre-training of a backbone on single things of the generated world, as ImageNet does for photographs.

Made once, kept under its own fingerprint, shared by every row and seed; its time is part of each record's cost. What is
interrupted goes on from its last checkpoint, to the same weights.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fpn_ablate.config.schema import AnyBackbone, Pretrain
from fpn_ablate.data.shapes import NUM_KINDS, World, classification_picture
from fpn_ablate.engine.train import read_checkpoint
from fpn_ablate.model.build import build_backbone
from fpn_ablate.model.detectors.two_stage import normalise
from fpn_ablate.model.init import initialise
from fpn_ablate.utils import signals
from fpn_ablate.utils.console import log_line
from fpn_ablate.utils.files import safe_name, save_text, write_atomically
from fpn_ablate.utils.hashing import code_version, digest
from fpn_ablate.utils.locks import exclusive
from fpn_ablate.utils.workers import ignore_signals, kill_slow_workers

# The code that decides the weights.
PARTS = (
    *("data/shapes", "engine/pretrain.py", "model/backbones", "model/build.py", "model/detectors/two_stage.py"),
    *("model/init.py", "model/ops", "model/optimise.py", "utils/seeding.py"),
)
CHECKPOINTS = 10  # over a pre-training, in equal distances
HELD_OUT = 1024  # pictures that the accuracy is measured on; training uses the ones after them


@dataclass(frozen=True)
class Pretrained:
    """Where the weights are, how good they are (share of held-out pictures named right) and what they took (seconds)."""

    path: Path
    accuracy: float
    seconds: float


class _Pictures(Dataset):
    def __init__(self, world: World, start: int, size: int) -> None:
        self.world, self.start, self.size = world, start, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = classification_picture(self.world, self.start + index)
        return torch.from_numpy(image).permute(2, 0, 1), label


class Classifier(nn.Module):
    """The backbone, global average pooling of C5, one linear layer over the kinds of things."""

    def __init__(self, cfg: AnyBackbone) -> None:
        super().__init__()
        self.backbone = build_backbone(cfg)
        self.classes = nn.Linear(self.backbone.out_channels, NUM_KINDS)

    def forward(self, images: Tensor) -> Tensor:
        sizes = torch.tensor([images.shape[-2:]] * len(images), device=images.device)
        x = normalise(images, sizes, self.backbone.mean, self.backbone.std)
        return self.classes(self.backbone(x)["c5"].mean((2, 3)))


def ensure(
    backbone: AnyBackbone,
    recipe: Pretrain,
    world: World,
    folder: Path,
    device: torch.device,
    workers: int = 0,
) -> Pretrained:
    """The weights for `cfg.backbone` on `world`; trained now if no run has done so. Jobs that start together wait for one."""
    facts = [backbone.label, recipe.model_dump(), asdict(_world(world, recipe)), str(device), code_version(PARTS)]
    path = folder / f"{safe_name(backbone.label)}-{digest(facts)[:12]}.pt"
    with exclusive(path.with_name(f"{path.name}.lock"), f"pre-training {backbone.label}"):
        if not path.exists():
            _train(backbone, recipe, world, path, device, max(1, workers))
    facts = json.loads(path.with_suffix(".json").read_text())
    return Pretrained(path, facts["accuracy"], facts["seconds"])


def _world(world: World, recipe: Pretrain) -> World:
    """A detail of the detection world: a thing, a lantern and a patch span the same pixels."""
    return replace(world, height=recipe.side, width=recipe.side, seed=recipe.seed, reference=world.short_side)


def _train(
    backbone: AnyBackbone,
    recipe: Pretrain,
    world: World,
    path: Path,
    device: torch.device,
    painters: int,
) -> None:
    started = time.monotonic()
    small_world = _world(world, recipe)
    model = Classifier(backbone)
    initialise(model, recipe.seed)
    model.to(device, memory_format=torch.channels_last).train()
    kept = path.with_name(f"{path.stem}-checkpoint.pt")
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, recipe.steps, pct_start=0.1)
    states = {"model": model, "optimizer": optimizer, "schedule": schedule}
    begun, before = _resume(kept, states)
    with signals.between_steps(), _beside(painters):
        for step, (images, labels) in enumerate(_batches(small_world, recipe, begun, painters), start=begun + 1):
            loss = F.cross_entropy(model(images.to(device)), labels.to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            spent = time.monotonic() - started
            if step % max(1, recipe.steps // 5) == 0:
                left = spent / (step - begun) * (recipe.steps - step)
                loss_text = f"loss {float(loss.detach()):.3f}"
                log_line(f"pre-training {backbone.label}: step {step}/{recipe.steps}, {loss_text}, {left:.0f} s left")
            if signals.pending_signal() or step % max(1, recipe.steps // CHECKPOINTS) == 0:
                signals.cancel_deadline()
                _save(kept, step, before + spent, states)
                signals.raise_if_stopped()
    accuracy = _accuracy(model, small_world, device)
    facts = {"accuracy": accuracy, "seconds": round(before + time.monotonic() - started, 1), "recipe": recipe.model_dump()}
    log_line(f"pre-training {backbone.label}: {accuracy:.1%} of held-out pictures right, {facts['seconds']:.0f} s")
    # The facts come first: the weights are what `ensure` looks for.
    save_text(path.with_suffix(".json"), json.dumps(facts))
    write_atomically(path, lambda temporary: torch.save(model.backbone.cpu().state_dict(), temporary))
    kept.unlink(missing_ok=True)


def _batches(world: World, recipe: Pretrain, begun: int, painters: int) -> Iterator[list[Tensor]]:
    """Of the steps after the first `begun`."""
    first, steps = HELD_OUT + begun * recipe.batch_size, recipe.steps - begun
    loader = DataLoader(
        _Pictures(world, first, steps * recipe.batch_size),
        recipe.batch_size,
        num_workers=painters,
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=ignore_signals,
    )
    return kill_slow_workers(iter(loader))


@contextmanager
def _beside(workers: int) -> Iterator[None]:
    """Leave the cores of busy `workers` to them: of threads that share a core with one, all others wait for the last."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - workers))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _save(path: Path, step: int, seconds: float, states: dict[str, Any]) -> None:
    content = {"step": step, "seconds": seconds, **{name: one.state_dict() for name, one in states.items()}}
    write_atomically(path, lambda temporary: torch.save(content, temporary))


def _resume(path: Path, states: dict[str, Any]) -> tuple[int, float]:
    """The steps that are done, and what they took; 0 and 0 without a checkpoint."""
    if not path.exists():
        return 0, 0.0
    content = read_checkpoint(path)
    for name, one in states.items():
        one.load_state_dict(content[name])
    return content["step"], content["seconds"]


@torch.no_grad()
def _accuracy(model: Classifier, world: World, device: torch.device) -> float:
    model.eval()
    right = 0
    for images, labels in DataLoader(_Pictures(world, 0, HELD_OUT), 128):
        right += int((model(images.to(device)).argmax(1).cpu() == labels).sum())
    return right / HELD_OUT

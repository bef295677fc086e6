"""Pre-training of a backbone as a classifier of single things of the generated world, as ImageNet serves for photographs.

The weights are made once, cached under their own fingerprint and shared by all rows and seeds; each record's cost includes the
time. An interrupted pre-training resumes from its last checkpoint, with the threads of its start, and ends with the same
weights. On a CPU another number of threads gives other last bits under the same name; the description beside the weights
says the number. Runs on other bits are other runs: their identity holds the digest of the weights (`runs.identity`).
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fpn_ablate.config.parts import AnyBackbone, UserBackbone
from fpn_ablate.config.schema import Pretrain
from fpn_ablate.data.shapes import NUM_KINDS, World, classification_picture
from fpn_ablate.engine.train import load_checkpoint, place, save_checkpoint
from fpn_ablate.engine.versions import pretraining_version
from fpn_ablate.model.build import build_backbone
from fpn_ablate.model.init import initialise
from fpn_ablate.utils import signals
from fpn_ablate.utils.console import log_line
from fpn_ablate.utils.files import safe_name, save_text, write_atomically
from fpn_ablate.utils.hashing import digest
from fpn_ablate.utils.locks import exclusive
from fpn_ablate.utils.threads import num_threads

CHECKPOINTS = 10  # per pre-training, equally spaced
LOSSES = 100  # read per pre-training, equally spaced, since reading one waits for the GPU
HELD_OUT = 1024  # pictures that measure the accuracy; training uses the pictures after them


Report = Callable[[int, float | None], None]  # (steps done, loss of some of them)


@dataclass(frozen=True)
class Pretrained:
    """Pre-trained weights: their file, the accuracy on held-out pictures (0..1), and the seconds this took (shipped: 0)."""

    path: Path
    accuracy: float
    seconds: float


class Classifier(nn.Module):
    """Backbone, global average pooling of C5 and one linear layer over the kinds of things."""

    def __init__(self, cfg: AnyBackbone) -> None:
        super().__init__()
        self.backbone = build_backbone(cfg)
        self.classes = nn.Linear(self.backbone.out_channels, NUM_KINDS)

    def forward(self, images: Tensor) -> Tensor:
        sizes = torch.tensor([images.shape[-2:]] * len(images), device=images.device)
        c5 = self.backbone(self.backbone.normalise(images, sizes))["c5"]
        return self.classes(c5.mean((2, 3)))


def load_or_pretrain(
    backbone: AnyBackbone,
    recipe: Pretrain,
    world: World,
    folder: Path,
    device: torch.device,
    workers: int = 0,
    wait: bool = True,
    report: Report = lambda step, loss: None,
) -> Pretrained:
    """Return the weights of `backbone` pre-trained on `world`; train them if no run has. Concurrent jobs wait for the first.

    `report` is called after each step.

    Raises:
        Held: another process trains them, and `wait` is False.
    """
    arguments = backbone.arguments if isinstance(backbone, UserBackbone) else {}
    network = [backbone.label, arguments, pretraining_version(backbone)]
    facts = [network, recipe.model_dump(), asdict(_world(world, recipe)), str(device)]
    path = folder / f"{safe_name(backbone.label)}-{digest(facts)[:12]}.pt"
    with exclusive(path.with_name(f"{path.name}.lock"), f"pre-training {backbone.label}", wait):
        if not path.exists():
            _train(backbone, recipe, world, path, device, max(1, workers), report)
    facts = json.loads(path.with_suffix(".json").read_text())
    return Pretrained(path, facts["accuracy"], facts["seconds"])


def _world(world: World, recipe: Pretrain) -> World:
    """Crop the detection world to pictures of recipe.side pixels: a thing, a lantern and a patch keep their size in pixels."""
    return replace(world, height=recipe.side, width=recipe.side, seed=recipe.seed, reference=world.short_side)


def _train(
    backbone: AnyBackbone,
    recipe: Pretrain,
    world: World,
    path: Path,
    device: torch.device,
    workers: int,
    report: Report,
) -> None:
    """Pre-train, and write the weights with their accuracy; `workers` processes draw the pictures."""
    started = time.monotonic()
    small_world = _world(world, recipe)
    model = Classifier(backbone)
    initialise(model, recipe.seed)
    place(model, device).train()
    checkpoint = path.with_name(f"{path.stem}-checkpoint.pt")
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, recipe.steps, pct_start=0.1)
    states = {"model": model, "optimizer": optimizer, "schedule": schedule}
    content = load_checkpoint(checkpoint, states)
    start, seconds_before = content["step"], content.get("seconds", 0.0)
    # One fewer for each busy worker: a thread that shares a core with a worker delays all other threads.
    threads = int(content.get("threads") or max(1, torch.get_num_threads() - workers))
    with signals.between_steps(), num_threads(threads):
        for step, (images, labels) in enumerate(_batches(small_world, recipe, start, workers), start=start + 1):
            loss = F.cross_entropy(model(images.to(device)), labels.to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            spent = time.monotonic() - started
            report(step, float(loss.detach()) if step % max(1, recipe.steps // LOSSES) == 0 else None)
            if signals.pending_signal() or step % max(1, recipe.steps // CHECKPOINTS) == 0:
                save_checkpoint(checkpoint, states, step=step, seconds=seconds_before + spent, threads=threads)
                signals.raise_if_stopped()
    accuracy = _accuracy(model, small_world, device)
    seconds = round(seconds_before + time.monotonic() - started, 1)
    facts = {"accuracy": accuracy, "seconds": seconds, "recipe": recipe.model_dump(), "world": asdict(small_world)}
    log_line(f"pre-training {backbone.label}: accuracy {accuracy:.1%} on held-out pictures, {seconds:.0f} s")
    # The weights are written last: `load_or_pretrain` takes their file as a sign that all is there.
    save_text(path.with_suffix(".json"), json.dumps(facts | {"threads": threads}))
    write_atomically(path, lambda temporary: torch.save(model.backbone.cpu().state_dict(), temporary))
    checkpoint.unlink(missing_ok=True)


def _batches(world: World, recipe: Pretrain, start: int, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of the steps from `start` (from 0) on."""
    loader = DataLoader(
        range(HELD_OUT + start * recipe.batch_size, HELD_OUT + recipe.steps * recipe.batch_size),
        recipe.batch_size,
        num_workers=workers,
        collate_fn=partial(_draw, world),
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=signals.outlive_signals,
    )
    return iter(loader)


def _draw(world: World, numbers: list[int]) -> tuple[Tensor, Tensor]:
    """Return the pictures (N, 3, H, W) of these numbers, and their labels (N,)."""
    images, labels = zip(*(classification_picture(world, number) for number in numbers), strict=True)
    return torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2).copy()), torch.tensor(labels)


@torch.no_grad()
def _accuracy(model: Classifier, world: World, device: torch.device) -> float:
    """Return the share of held-out pictures that `model` classifies correctly."""
    model.eval()
    correct = 0
    for images, labels in DataLoader(range(HELD_OUT), 128, collate_fn=partial(_draw, world)):
        correct += int((model(images.to(device)).argmax(1).cpu() == labels).sum())
    return correct / HELD_OUT

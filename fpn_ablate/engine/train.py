"""Training of one row: a plain loop over batches."""

import math
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fpn_ablate.config.schema import Recipe
from fpn_ablate.data.loader import training_batches
from fpn_ablate.data.transforms import Resize
from fpn_ablate.engine.optim import base_learning_rate, build_optimizer, learning_rate_factor, set_learning_rate
from fpn_ablate.model.detectors.two_stage import Detector
from fpn_ablate.structures.batch import Batch, DetectionDataset
from fpn_ablate.structures.instances import Proposals, Targets
from fpn_ablate.utils import signals
from fpn_ablate.utils.errors import Diverged, UserError, first_line
from fpn_ablate.utils.files import write_atomically
from fpn_ablate.utils.seeding import torch_generator

Report = Callable[[int, dict[str, float]], None]  # (steps done, named values)


def batch_targets(batch: Batch) -> Targets:
    return Targets(batch.boxes, batch.labels, batch.valid, batch.crowd, batch.sizes)


def batch_proposals(batch: Batch) -> Proposals | None:
    """The fixed proposals that come with a batch, whose order is all that is known of their scores."""
    if batch.proposals is None:
        return None
    return Proposals(batch.proposals, torch.zeros_like(batch.proposals[..., 0]), batch.proposals_valid)


def autocast(bf16: bool, device: torch.device) -> torch.autocast:
    """Run convolutions in bf16 on a GPU if `bf16`; never on a CPU, where it is slower than fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16 and device.type == "cuda")


@signals.between_steps()
def train(
    model: Detector,
    dataset: DetectionDataset,
    recipe: Recipe,
    device: torch.device,
    *,
    seed: int,
    steps: int,
    workers: int = 0,
    checkpoint: Path | None = None,
    log_every: int = 1,
    report: Report = lambda step, values: None,
) -> None:
    """Fine-tune in place, for `steps` steps, what of `model` is not frozen.

    Continues from `checkpoint` if it exists, and ends with the same weights, bit by bit on a CPU, as an uninterrupted run.

    Raises:
        Diverged: a loss is not finite; the message names the step, the loss and the images.
        Stopped: a signal asked for it; the checkpoint is of the step that was under way.
    """
    optimizer = build_optimizer(model, recipe.optimizer)
    sampling = torch_generator(seed, "sampling", device=device)
    start = _resume(checkpoint, model, optimizer, sampling) if checkpoint else 0
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    batches = training_batches(
        dataset,
        batch_size=recipe.batch_size,
        parts=recipe.accumulate,
        steps=range(start, steps),
        seed=seed,
        flip=recipe.flip,
        group_by_aspect=recipe.group_by_aspect,
        resize=Resize.of(recipe),
        workers=workers,
    )
    base = base_learning_rate(recipe.optimizer, recipe.batch_size)
    model.train()
    for step in range(start, steps):
        rate = base * learning_rate_factor(step, steps, recipe.schedule)
        set_learning_rate(optimizer, rate)
        optimizer.zero_grad(set_to_none=True)
        losses, image_ids = _gradients(model, islice(batches, recipe.accumulate), recipe, device, sampling)
        if recipe.clip_norm:
            torch.nn.utils.clip_grad_norm_(trained, recipe.clip_norm)
        done = step + 1
        # Reading a loss waits for a GPU, so there it is read now and then only; a NaN stays until then, and is never saved.
        logged = done % log_every == 0 or done == steps
        stop = signals.pending_signal()
        # After the last step as well: what is killed while it is evaluated is not trained again.
        saved = checkpoint and (stop or done == steps or done % recipe.checkpoint_every == 0)
        if logged or saved or device.type == "cpu":
            values = _finite(losses, step, image_ids)
        if logged:
            report(done, {**values, "lr": rate})
        optimizer.step()
        if checkpoint and saved:
            signals.cancel_deadline()
            _save(checkpoint, done, model, optimizer, sampling)
        if stop or saved:  # a signal since `stop` was read has lost its timer
            signals.raise_if_stopped()


def _gradients(
    model: Detector, parts: Iterable[Batch], recipe: Recipe, device: torch.device, sampling: torch.Generator
) -> tuple[dict[str, Tensor], list[int]]:
    """Leave the gradients of one update in the parameters; returns its named losses and the images that they are of.

    The losses of a part are means over its own samples, and those of the update are means over its parts: what the paper's 8
    GPUs, with 2 images each, compute. Where every image gives its full number of samples, as nearly always, that is the mean
    over the whole batch. Batch norm that is not frozen takes its statistics from a part.
    """
    losses: dict[str, Tensor] = {}
    image_ids = []
    for batch in parts:
        batch = batch.to(device)
        with autocast(recipe.bf16, device):
            own = model.losses(batch.images, batch_targets(batch), sampling, batch_proposals(batch))
        shares = {name: loss / recipe.accumulate for name, loss in own.items()}
        torch.stack(list(shares.values())).sum().backward()
        losses = {name: losses.get(name, 0) + share.detach() for name, share in shares.items()}
        image_ids += batch.image_ids
    return losses, image_ids


def _finite(losses: dict[str, Tensor], step: int, image_ids: list[int]) -> dict[str, float]:
    values = {name: float(loss) for name, loss in losses.items()}
    for name, value in values.items():
        if not math.isfinite(value):
            raise Diverged(
                f"diverged at step {step}: {name} is {value} (losses {values}, images {image_ids}); "
                "lower recipe.optimizer.lr or set recipe.clip_norm"
            )
    return values


def _save(path: Path, step: int, model: Detector, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> None:
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "sampling": generator.get_state(),
    }
    write_atomically(path, lambda temporary: torch.save(state, temporary))


def _resume(path: Path, model: Detector, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> int:
    """The step to go on from; 0 without a checkpoint. Order and flips are functions of the step and need no state."""
    if not path.exists():
        return 0
    state = read_checkpoint(path)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    generator.set_state(state["sampling"])
    return state["step"]


def checkpointed_steps(path: Path) -> int:
    """The steps done by a checkpoint; 0 without one."""
    return read_checkpoint(path)["step"] if path.exists() else 0


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Raises UserError."""
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises many kinds for a file that is not one of its own
        reason = first_line(error)
        raise UserError(f"{path}: not a checkpoint ({reason}); remove it, and training begins anew") from None

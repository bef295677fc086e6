"""Training loop: a plain loop over batches, with checkpoints."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fpn_ablate.config.schema import Recipe
from fpn_ablate.data.loader import training_batches
from fpn_ablate.data.transforms import Resize
from fpn_ablate.engine.distributed import ALONE, Ranks
from fpn_ablate.engine.optim import base_learning_rate, build_optimizer, learning_rate_factor, set_learning_rate
from fpn_ablate.engine.parts import PartSum, RunningStatistics
from fpn_ablate.model.detectors.two_stage import Detector
from fpn_ablate.model.precision import uses_bf16
from fpn_ablate.structures.batch import Batch, DetectionDataset
from fpn_ablate.structures.instances import Proposals, Targets
from fpn_ablate.utils import seeding, signals
from fpn_ablate.utils.errors import Diverged, UserError, first_line
from fpn_ablate.utils.files import write_atomically
from fpn_ablate.utils.seeding import torch_generator
from fpn_ablate.weights.files import load_torch

M = TypeVar("M", bound=nn.Module)
Report = Callable[[int, dict[str, float]], None]  # (steps done, losses and learning rate)


def batch_targets(batch: Batch) -> Targets:
    """Return the ground truth of a batch."""
    return Targets(batch.boxes, batch.labels, batch.valid, batch.crowd, batch.sizes, batch.masks)


def batch_proposals(batch: Batch) -> Proposals | None:
    """Return the fixed proposals of a batch; None without any. They have an order but no scores, so scores are 0."""
    if batch.proposals is None:
        return None
    return Proposals(batch.proposals, torch.zeros_like(batch.proposals[..., 0]), batch.proposals_valid)


def place(model: M, device: torch.device) -> M:
    """Move a model to a device, its images and weights (4-d tensors) in channels_last: a step takes a quarter less time."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.to(memory_format=torch.channels_last)
    return model.to(device)


def autocast(bf16: bool, device: torch.device) -> torch.autocast:
    """Return a context that runs convolutions in bf16 if `bf16`, where that is faster than fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(bf16, device))


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
    advance: Callable[[], None] = lambda: None,
    ranks: Ranks = ALONE,
) -> None:
    """Train the parameters of `model` that are not frozen, in place, up to step `steps`.

    Resume from `checkpoint` if that file exists. The final weights equal those of an uninterrupted run, bit for bit on a CPU.

    Args:
        seed: for the order and flips of images and for sampling anchors and RoIs.
        report: called every `log_every` steps and after the last, on rank 0.
        advance: called after each part of a batch that this rank computes.
        ranks: share the parts of each update, of which `recipe.accumulate` says the number.

    Raises:
        Diverged: a loss is not finite; the message names the step, the loss and the images.
        Stopped: a signal asked this process, or another rank, to stop; the checkpoint holds the step that was in progress.
    """
    optimizer = build_optimizer(model, recipe.optimizer, model.backbone_parts.values())
    states = {"model": model, "optimizer": optimizer}
    start = load_checkpoint(checkpoint, states)["step"] if checkpoint else 0
    _check_start(start, checkpoint, ranks)
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
        ranks=(ranks.rank, ranks.size),
    )
    base = base_learning_rate(recipe.optimizer, recipe.batch_size)
    model.train()
    statistics = RunningStatistics(model, recipe.accumulate, ranks)
    for step in range(start, steps):
        rate = base * learning_rate_factor(step, steps, recipe.schedule)
        set_learning_rate(optimizer, rate)
        optimizer.zero_grad(set_to_none=True)
        sums = PartSum(trained, ranks)
        image_ids = _backward(model, batches, recipe, device, (seed, step), sums, statistics, advance)
        losses, stop = sums.finish()
        if recipe.clip_norm:
            torch.nn.utils.clip_grad_norm_(trained, recipe.clip_norm)
        done = step + 1
        # Reading a loss waits for the GPU, so there it is read only to log or save. A NaN lasts until then and is not saved.
        logged = done % log_every == 0 or done == steps
        # Also after the last step: a run killed during evaluation need not train again.
        saved = checkpoint and (stop or done == steps or done % recipe.checkpoint_every == 0)
        if logged or saved or device.type == "cpu":
            values = _check_finite(losses, step, image_ids, ranks)
        if logged and ranks.first:
            report(done, {**values, "lr": rate})
        optimizer.step()
        if checkpoint and saved and ranks.first:
            save_checkpoint(checkpoint, states, step=done)
        if stop:
            raise signals.Stopped(stop)


def _check_start(start: int, checkpoint: Path | None, ranks: Ranks) -> None:
    """Check that all ranks go on from the same step, where they are on several machines.

    Raises:
        UserError: a rank does not read the checkpoint that rank 0 reads.
    """
    expected = ranks.broadcast(start)
    if start != expected:
        raise UserError(f"{checkpoint}: this machine sees step {start} there, that of rank 0 step {expected}: share the folder")


def _backward(
    model: Detector,
    batches: Iterator[Batch],
    recipe: Recipe,
    device: torch.device,
    key: tuple[int, int],
    sums: PartSum,
    statistics: RunningStatistics,
    advance: Callable[[], None],
) -> list[list[int]]:
    """Add up the gradients and losses of one update over the parts of its batch; return the image ids of this rank's parts.

    The losses of a part are means over its samples; the losses of the update are means over the parts, as on the paper's 8 GPUs
    with 2 images each. These equal the means over the whole batch if each image yields its full number of samples, as nearly
    always; not so for masks, which only positives have, and for dense heads, which divide by a part's positives. Batch norm
    that is not frozen takes its statistics from one part.

    Args:
        key: seed and step. The samples of a part depend on them and on its number alone: a resumed training needs no state, and
            whatever process computes a part draws the same.
    """
    image_ids = []
    for number in sums.ranks.share(range(recipe.accumulate)):
        batch = next(batches).to(device)
        generators = partial(torch_generator, *key, number, device=device)
        torch.manual_seed(seeding.key(*key, number, "layers"))  # for layers that draw by themselves: a user's dropout
        statistics.begin_part()
        with autocast(recipe.bf16, device):
            part_losses = model.losses(batch.images, batch_targets(batch), generators, batch_proposals(batch))
        shares = {name: loss / recipe.accumulate for name, loss in part_losses.items()}
        torch.stack(list(shares.values())).sum().backward()
        sums.add({name: share.detach() for name, share in shares.items()}, signals.pending_signal())
        statistics.add_parts()
        image_ids.append(batch.image_ids)
        advance()
    return image_ids


def _check_finite(losses: dict[str, Tensor], step: int, image_ids: list[list[int]], ranks: Ranks) -> dict[str, float]:
    """Return the losses as floats, or raise `Diverged` for the first that is not finite, on all ranks alike."""
    values = dict(zip(losses, torch.stack(list(losses.values())).tolist(), strict=True))  # one wait for a GPU
    for name, value in values.items():
        if not math.isfinite(value):
            images = list(chain.from_iterable(ranks.gather(image_ids)))
            raise Diverged(
                f"diverged at step {step}: {name} is {value} (losses {values}, images {images}); "
                "lower recipe.optimizer.lr or set recipe.clip_norm"
            )
    return values


def save_checkpoint(path: Path, states: dict[str, Any], **values: float) -> None:
    """Write the states of modules and optimisers, by name, and further values."""
    content = values | {name: part.state_dict() for name, part in states.items()}
    write_atomically(path, lambda temporary: torch.save(content, temporary))


def load_checkpoint(path: Path, states: dict[str, Any]) -> dict[str, Any]:
    """Load what `save_checkpoint` wrote into `states` and return it; {"step": 0} without a file.

    Randomness is a function of the step: no state.
    """
    if not path.exists():
        return {"step": 0}
    content = read_checkpoint(path)
    for name, part in states.items():
        part.load_state_dict(content[name])
    return content


def checkpointed_steps(path: Path) -> int:
    """Return the number of steps that a checkpoint has done; 0 without one."""
    return read_checkpoint(path)["step"] if path.exists() else 0


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint.

    Raises:
        UserError: the file is damaged.
    """
    try:
        return load_torch(path)
    except Exception as error:  # torch raises many kinds for a file that is not one of its own
        reason = first_line(error)
        raise UserError(f"{path}: not a checkpoint ({reason}); remove it to train from the start") from None

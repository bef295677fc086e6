"""Retry a training that ran out of GPU memory, once: same batches, split into parts whose gradients are accumulated."""

import sys
from dataclasses import replace

import torch

from fpn_ablate.config.schema import Recipe
from fpn_ablate.engine import procedures
from fpn_ablate.engine.cost import reset_peak_memory
from fpn_ablate.runs.state import Run
from fpn_ablate.utils.console import log_line
from fpn_ablate.utils.errors import first_line


def train_with_oom_retry(run: Run, context: procedures.RunContext, supply: procedures.ProposalSupply) -> procedures.Trained:
    """Train or load the run's network; retry in parts from the start if the GPU has no room for a batch.

    Raises:
        torch.cuda.OutOfMemoryError: the retry ran out of memory too, or a part has one image already.
    """
    if run.retried:
        context = _in_parts(context, run.retried["accumulate"])
    try:
        return procedures.train_or_load(context, supply)
    except torch.cuda.OutOfMemoryError as error:
        parts = more_parts(context.cfg.recipe)
        if run.retried or parts is None:
            raise
        reason = first_line(error)
    # Not in the handler: the traceback keeps the first attempt's tensors on the GPU.
    log_line(f"{run.title}: {reason}; retrying with recipe.accumulate={parts}", sys.stderr)
    for name in procedures.RESUME_FILES:  # before `retried` is recorded: no checkpoint mixes both attempts
        (run.folder / name).unlink(missing_ok=True)
    run.retried = {"after": reason, "accumulate": parts}
    run.write_running_record()
    run.close_loggers(exit_code=1)
    run.open_loggers()
    reset_peak_memory(run.inputs.device)
    return procedures.train_or_load(_in_parts(context, parts), supply)


def _in_parts(context: procedures.RunContext, parts: int) -> procedures.RunContext:
    """Set recipe.accumulate."""
    recipe = context.cfg.recipe.model_copy(update={"accumulate": parts})
    return replace(context, cfg=context.cfg.model_copy(update={"recipe": recipe}))


def more_parts(recipe: Recipe) -> int | None:
    """Return the number of parts with 2 images each, as on the paper's 8 GPUs, else with 1; None if they have 1 already."""
    images = recipe.batch_size // recipe.accumulate
    smaller = [n for n in (2, 1) if n < images and recipe.batch_size % n == 0]
    return recipe.batch_size // smaller[0] if smaller else None

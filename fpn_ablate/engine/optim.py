"""Optimiser and learning-rate schedule."""

import math

import torch
from torch import nn

from fpn_ablate.config.schema import Optimizer, Schedule

STEP_FACTOR = 0.1  # the paper drops the learning rate tenfold
WARMUP_START = 1 / 3  # Detectron's


def base_learning_rate(optimizer: Optimizer, batch_size: int) -> float:
    """Scale `lr`, given for `lr_batch_size` images, linearly with the batch size (Goyal et al. 2017).

    The number of steps is not scaled: a batch k times smaller needs k times the steps to see as many images.
    """
    return optimizer.lr * batch_size / (optimizer.lr_batch_size or batch_size)


def learning_rate_factor(step: int, steps: int, schedule: Schedule) -> float:
    """Return the factor on the base rate at `step` (from 0) of `steps`. A pure function, so resuming needs no state."""
    warm = 1.0
    if step < schedule.warmup_steps:
        warm = WARMUP_START + (1 - WARMUP_START) * step / schedule.warmup_steps
    if schedule.name == "cosine":
        return warm * 0.5 * (1 + math.cos(math.pi * step / steps))
    return warm * STEP_FACTOR ** sum(step >= round(drop * steps) for drop in schedule.drops)


def build_optimizer(model: nn.Module, cfg: Optimizer) -> torch.optim.Optimizer:
    """Build the optimiser of trainable parameters. AdamW decays no biases and norms, as its users expect; SGD decays all."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if cfg.name == "sgd":
        return torch.optim.SGD(parameters, lr=cfg.lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay, fused=True)
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": cfg.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=cfg.lr, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = rate

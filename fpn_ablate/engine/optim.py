"""Optimiser and learning-rate schedule."""

import math
from collections.abc import Iterable

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


def build_optimizer(model: nn.Module, cfg: Optimizer, backbone: Iterable[nn.Module] = ()) -> torch.optim.Optimizer:
    """Build the optimiser of trainable parameters. AdamW decays no biases and norms, as its users expect; SGD decays all.

    Args:
        backbone: modules of `model` whose rate is `backbone_lr_factor` times that of the others.
    """
    slower = {id(p) for module in backbone for p in module.parameters()} if cfg.backbone_lr_factor != 1 else set()
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for p in model.parameters():
        if p.requires_grad:
            groups.setdefault((cfg.name == "adamw" and p.dim() <= 1, id(p) in slower), []).append(p)
    settings = [
        {
            "params": parameters,
            "weight_decay": 0.0 if is_spared else cfg.weight_decay,
            "lr_factor": cfg.backbone_lr_factor if is_slower else 1.0,
        }
        for (is_spared, is_slower), parameters in sorted(groups.items())
    ]
    if cfg.name == "sgd":
        optimizer = torch.optim.SGD(settings, lr=cfg.lr, momentum=cfg.momentum, fused=True)
    else:
        optimizer = torch.optim.AdamW(settings, lr=cfg.lr, fused=True)
    set_learning_rate(optimizer, cfg.lr)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all parameter groups of `build_optimizer`: the backbone's is its factor times `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"]

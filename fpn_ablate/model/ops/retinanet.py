"""RetinaNet's head with a focal loss that computes its own gradient, in a third of the passes over the logits.

Shape letters: N images, R anchors an image, K classes, M positives of a batch.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from fpn_ablate.model.heads.retinanet import RetinaNetHead


class FastRetinaNetHead(RetinaNetHead):
    """`RetinaNetHead` that treats nearly all logits alike, as those of wrong classes, and corrects the M right ones."""

    def _class_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        return _FocalLoss.apply(logits, labels, *self.focal)


class _FocalLoss(torch.autograd.Function):
    """Losses (N, R), summed over the classes, of logits (N, R, K) and labels (N, R), 0 for none; keeps the gradient alone."""

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, labels: Tensor, alpha: float | None, gamma: float) -> Tensor:
        right, wrong = (1, 1) if alpha is None else (alpha, 1 - alpha)
        p, cross_entropy = logits.sigmoid(), F.softplus(logits)
        factor = p**gamma if gamma else torch.ones_like(p)
        image, place = labels.nonzero(as_tuple=True)
        at = image, place, labels[image, place] - 1
        # Of the right classes (M,): the loss of their own kind in place of that of a wrong class.
        q, own = 1 - p[at], F.softplus(-logits[at])
        change = right * q**gamma * own - wrong * factor[at] * cross_entropy[at]
        gradient_of_right = -right * q**gamma * (gamma * p[at] * own + q)
        losses = wrong * (factor * cross_entropy).sum(-1)
        losses[image, place] += change
        # d/dx of p^gamma softplus(x) is p^gamma (gamma (1 - p) softplus(x) + p).
        gradient = cross_entropy.mul_(1 - p).mul_(gamma).add_(p).mul_(factor).mul_(wrong)
        gradient[at] = gradient_of_right
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad[..., None], None, None, None

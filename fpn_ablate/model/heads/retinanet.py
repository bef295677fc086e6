"""RetinaNet's head (Lin et al. 2017): anchors, two subnets, focal loss.

Shape letters: N images, A anchors a cell, Hi x Wi cells and Ri = Hi * Wi * A anchors of level i, R = sum of Ri, M positives
of a batch, T anchors that NMS leaves, K classes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou_loss

from fpn_ablate.config.dense import RetinaNetTask
from fpn_ablate.model import anchors, boxes
from fpn_ablate.model.heads.dense import DenseHead, Subnet, prior_bias
from fpn_ablate.model.matching import IGNORED, POSITIVE, match
from fpn_ablate.model.nms import suppress
from fpn_ablate.model.precision import autocast_off, full_precision
from fpn_ablate.structures.instances import Targets
from fpn_ablate.structures.levels import Features, Level

MOMENTUM, START = 0.9, 100.0  # of the moving average of positives (detectron2)
CANDIDATES = 4096  # hardest anchors of an image that NMS reads, with loss=ohem


def octave_sizes(size: float, scales: int, round_down: bool = False) -> list[float]:
    """Return `scales` sizes of one octave, from `size` on; `round_down`: to whole pixels, as torchvision does."""
    sizes = [size * 2 ** (k / scales) for k in range(scales)]
    return [float(int(s)) for s in sizes] if round_down else sizes


def focal_loss(logits: Tensor, target: Tensor, alpha: float | None, gamma: float) -> Tensor:
    """Return the focal loss -alpha_t (1 - p_t)^gamma log(p_t) of each logit (Eq. 5).

    Args:
        target: bool, whether the class is the right one.
        alpha: weight of the right class, 1 - alpha that of a wrong one; None: no weights.
        gamma: 0: cross-entropy.
    """
    wrong = torch.where(target, -logits, logits)  # the logit of 1 - p_t
    loss = F.softplus(wrong)
    if gamma:
        p = wrong.sigmoid()
        # Below a gamma of 1 the slope of p^gamma is infinite at 0, and its product with the sigmoid's, 0 there, is NaN.
        loss = (p.clamp(min=torch.finfo(p.dtype).tiny) if gamma < 1 else p) ** gamma * loss
    return loss if alpha is None else torch.where(target, alpha, 1 - alpha) * loss


class RetinaNetHead(DenseHead):
    """Anchors, one subnet for classes and one for boxes, shared by all levels but not with each other.

    Args: as `DenseHead`, and in `config`
        anchor_scales: anchors of each size and ratio, within an octave.
        unreached: best anchor of an object that none reaches: "positive" at any IoU, or "negative" below `negative_iou`.
        normaliser: number of positives by which losses are divided: of the "batch", of each "image" (then the mean over the
            images), or a "moving" average over the batches.
    """

    label = "retinanet"

    def __init__(
        self,
        levels: Sequence[Level],
        config: RetinaNetTask,
        num_classes: int,
        short_side: int = anchors.PAPER_SHORT_SIDE,
    ) -> None:
        super().__init__(levels, config, num_classes, short_side)
        like_torchvision = config.anchor_grid == "torchvision"
        octaves = [
            octave_sizes(anchors.scaled(size, short_side), config.anchor_scales, like_torchvision)
            for size in config.anchor_sizes
        ]
        if len(self.levels) == 1:
            octaves = [[size for octave in octaves for size in octave]]
        self.anchors = anchors.AnchorGrids(self.levels, octaves, config.anchor_ratios, like_torchvision)
        num_anchors, channels = len(octaves[0]) * len(config.anchor_ratios), self.levels[0].channels
        self.class_subnet = Subnet(channels, config.convolutions, config.norm)
        self.box_subnet = Subnet(channels, config.convolutions, config.norm)
        self.scores = nn.Conv2d(channels, num_anchors * num_classes, 3, padding=1)
        self.deltas = nn.Conv2d(channels, num_anchors * 4, 3, padding=1)
        if config.normaliser == "moving":
            self.register_buffer("moving_positives", torch.tensor(START))

    def init_parameter(self, layer: nn.Module, parameter: Tensor, generator: torch.Generator) -> bool:
        """Draw Gaussian weights of 0.01 (or He's in the subnets), and a bias that makes each score `prior` (Sec. 4.1)."""
        if parameter is self.scores.bias:
            nn.init.constant_(parameter, prior_bias(self.config.prior))
            return True
        if self.config.init == "he" and parameter.dim() > 1 and layer not in (self.scores, self.deltas):
            nn.init.kaiming_normal_(parameter, nonlinearity="relu", generator=generator)
            return True
        return super().init_parameter(layer, parameter, generator)

    def forward(self, features: Features) -> tuple[list[Tensor], list[Tensor]]:
        """Return, for each level, the logits (N, Ri, K) of the scores and the deltas (N, Ri, 4), in the anchors' order."""
        hidden = [(self.class_subnet(x), self.box_subnet(x)) for x in features.values()]
        with autocast_off():  # as in the RPN: scores of bf16 would tie
            logits = [anchors.flatten_cells(self.scores(full_precision(x)), self.num_classes) for x, _ in hidden]
            return logits, [anchors.flatten_cells(self.deltas(full_precision(x)), 4) for _, x in hidden]

    def predict(self, features: Features) -> list[tuple[Tensor, Tensor]]:
        levels = zip(*self(features), self.anchors(features), strict=True)
        return [(logits.sigmoid(), boxes.decode(deltas, anchor)) for logits, deltas, anchor in levels]

    def losses(self, features: Features, targets: Targets, generator: torch.Generator) -> dict[str, Tensor]:
        """Return `class` (focal, or another of the configuration's) and `box` (of the positives), in fp32."""
        config, anchor = self.config, torch.cat(self.anchors(features))
        logits, deltas = (torch.cat(column, 1) for column in self(features))
        matched_idxs, matches = match(
            anchor,
            targets.boxes,
            targets.valid,
            targets.crowd,
            config.positive_iou,
            config.negative_iou,
            low_quality_iou=config.negative_iou if config.unreached == "negative" else 0,
        )
        positive = matches == POSITIVE
        image, place = positive.nonzero(as_tuple=True)
        objects = image, matched_idxs[image, place]
        labels = torch.zeros_like(matched_idxs)
        labels[image, place] = targets.labels[objects]
        class_loss = self._class_losses(logits, labels).masked_fill(matches == IGNORED, 0)
        box_loss = self._box_losses(deltas[image, place], anchor[place], targets.boxes[objects])
        weights = self._weights(positive)
        if config.loss == "ohem":
            chosen = self._hardest(class_loss.detach(), anchor, matches)
            class_loss = (class_loss * chosen).sum() / chosen.sum().clamp(min=1)
        else:
            class_loss = (class_loss.sum(1) * weights).sum()
        return {"class": class_loss, "box": config.box_loss_weight * (box_loss * weights[image]).sum()}

    def _class_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss (N, R) of each anchor, summed over the classes; labels (N, R) are 0 for all but positives."""
        target = labels[..., None] == torch.arange(1, self.num_classes + 1, device=labels.device)
        return focal_loss(logits, target, *self.focal).sum(-1)

    @property
    def focal(self) -> tuple[float | None, float]:
        """Return alpha and gamma of the focal loss, of which the other losses are special cases."""
        alpha, gamma, loss = self.config.alpha, self.config.gamma, self.config.loss
        return {"focal": (alpha, gamma), "balanced_ce": (alpha, 0)}.get(loss, (None, 0))

    def _box_losses(self, deltas: Tensor, anchor: Tensor, gt_boxes: Tensor) -> Tensor:
        """Return the losses (M,) of the boxes of positives, from deltas, anchors and objects (M, 4)."""
        if self.config.box_loss == "giou":
            return generalized_box_iou_loss(boxes.decode(deltas, anchor), gt_boxes)
        beta = self.config.box_loss_beta if self.config.box_loss == "smooth_l1" else 0
        return F.smooth_l1_loss(deltas, boxes.encode(gt_boxes, anchor), beta=beta, reduction="none").sum(-1)

    def _weights(self, positive: Tensor) -> Tensor:
        """Return the weights (N,) of the images' losses: one over the number of positives (N, R) by `normaliser`."""
        count = positive.sum(1)
        if self.config.normaliser == "image":
            return 1 / (count.clamp(min=1) * len(count))
        total = count.sum().clamp(min=1)
        if self.config.normaliser == "moving":
            total = self.moving_positives.lerp_(total.to(self.moving_positives), 1 - MOMENTUM)
        return (1 / total).expand(len(count))

    @torch.no_grad()
    def _hardest(self, losses: Tensor, anchor: Tensor, matches: Tensor) -> Tensor:
        """Choose the anchors of each image with the largest losses (N, R) after NMS by loss: (N, R) bool (OHEM, Sec. 5.1)."""
        config, n = self.config, len(losses)
        top, idxs = losses.masked_fill(matches == IGNORED, -torch.inf).topk(min(CANDIDATES, losses.shape[1]))
        image, place = torch.isfinite(top).nonzero(as_tuple=True)
        rows, valid = suppress(anchor[idxs[image, place]], top[image, place], image, image, n, config.ohem_nms_thresh)
        idxs = idxs[image, place][rows]  # (N, T), hardest first
        positive = valid & (matches.gather(1, idxs) == POSITIVE)
        if config.ohem_negatives is not None:
            negatives = (valid & ~positive).cumsum(1)
            valid &= positive | (negatives <= config.ohem_negatives * positive.sum(1, keepdim=True).clamp(min=1))
        valid &= valid.cumsum(1) <= config.ohem_samples
        return torch.zeros_like(losses, dtype=torch.bool).scatter_reduce(1, idxs, valid, "amax")

"""SSD's head (Liu et al. 2016) on any levels: default boxes, a softmax with background, hard negatives.

Shape letters: N images, L levels, A default boxes a cell of a level, Hi x Wi cells of level i, R = sum(Hi * Wi * A) default
boxes of an image, G ground-truth boxes, K classes. Labels are 1..K; 0 is background.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpn_ablate.config.dense import SSDTask
from fpn_ablate.model import anchors, boxes
from fpn_ablate.model.heads.dense import DenseHead, prior_bias
from fpn_ablate.model.heads.retinanet import focal_loss
from fpn_ablate.model.matching import IGNORED, NEGATIVE, POSITIVE, image_by_image, perhaps_any, too_many_pairs
from fpn_ablate.model.precision import autocast_off, full_precision
from fpn_ablate.structures.instances import Targets
from fpn_ablate.structures.levels import Features, Level


def scales(levels: int, low: float, high: float, first: float | None, whole_percent: bool) -> list[float]:
    """Return the scales of L levels and the one that would follow, as shares of the image's side (their Eq. 4).

    The scales grow in equal steps from `low` to `high`; a single map has `low`, and `high` follows.

    Args:
        first: the scale of the finest map, which then stands outside of the steps; None: it is the first of them.
        whole_percent: the step is cut to a whole per cent, as the authors' code does: .15 .33 .51 .69 .87 1.05 on COCO.
    """
    own = [] if first is None or levels == 1 else [first]
    steps = levels - len(own) - 1
    if steps == 0:
        return [*own, low, high]
    step = (high - low) / steps
    if whole_percent:
        step = math.floor(round(100 * step, 6)) / 100
    return own + [low + k * step for k in range(steps + 2)]


def cell_boxes(scale: float, following: float, ratios: Sequence[float], clip: bool) -> Tensor:
    """Return the widths and heights (A, 2) of the default boxes of a cell, as shares of the image's side.

    A square of `scale`, the extra square between it and the scale that follows, and for each ratio a wide and a high box.

    Args:
        clip: cut sides that are longer than the image's.
    """
    extra = math.sqrt(scale * following)
    sides = [[scale, scale], [extra, extra]]
    for ratio in ratios:
        long, short = scale * math.sqrt(ratio), scale / math.sqrt(ratio)
        sides += [[long, short], [short, long]]
    return torch.tensor(sides).clamp(max=1 if clip else torch.inf)


def match(default_boxes: Tensor, gt_boxes: Tensor, valid: Tensor, crowd: Tensor, positive_iou: float) -> tuple[Tensor, Tensor]:
    """Match default boxes (R, 4) with ground truth (N, G, 4).

    Positive: an IoU of at least `positive_iou` with any object, and the one best box of each object, which is then that
    object's, whatever else it overlaps; of several objects with the same best box the last has it. The rest is negative, or
    ignored where it lies in a crowd region by half of its own area.

    Returns:
        matched_idxs (N, R) int64: the object of a positive box; labels (N, R) int8: POSITIVE, NEGATIVE, IGNORED.
    """
    n, g = valid.shape
    if g == 0:
        empty = torch.zeros(n, len(default_boxes), dtype=torch.int64, device=default_boxes.device)
        return empty, empty.to(torch.int8)
    if too_many_pairs(valid, len(default_boxes)):
        return image_by_image(lambda *image: match(default_boxes, *image, positive_iou), gt_boxes, valid, crowd)
    intersections = boxes.intersection(gt_boxes, default_boxes.expand(n, -1, -1))  # (N, G, R)
    area = boxes.area(default_boxes)
    overlap = boxes.iou_from(intersections, boxes.area(gt_boxes), area.expand(n, -1)).masked_fill_(~valid[..., None], -1)
    best, matched_idxs = overlap.max(1)
    labels = torch.full_like(matched_idxs, NEGATIVE, dtype=torch.int8)
    if perhaps_any(crowd):
        labels.masked_fill_(((2 * intersections >= area) & crowd[..., None]).any(1), IGNORED)
    labels.masked_fill_(best >= positive_iou, POSITIVE)
    highest, best_box = overlap.max(2)
    number = torch.arange(1, g + 1, device=best_box.device) * (highest > 0)  # 0: padding, or an object beside every box
    owner = torch.zeros_like(matched_idxs).scatter_reduce(1, best_box, number, "amax")
    return torch.where(owner > 0, owner - 1, matched_idxs), labels.masked_fill_(owner > 0, POSITIVE)


def hard_negatives(background_loss: Tensor, labels: Tensor, ratio: float) -> Tensor:
    """Choose the negatives of each image with the highest loss, at most `ratio` for each of its positives: (N, R) bool.

    Args:
        background_loss: (N, R), the loss of a box if it is background.
        labels: (N, R), as `match` returns them.
    """
    negative = labels == NEGATIVE
    wanted = ratio * (labels == POSITIVE).sum(1, keepdim=True)
    # No more than are wanted of any image: a sort of all takes ten times as long.
    most = min(math.ceil(wanted.max()), labels.shape[1])
    hardest = background_loss.masked_fill(~negative, -torch.inf).topk(most, dim=1).indices
    chosen = torch.arange(most, device=labels.device) < wanted
    return torch.zeros_like(negative).scatter(1, hardest, chosen) & negative


class SSDHead(DenseHead):
    """A 3x3 convolution for classes and one for deltas on each level, shared by none.

    With `loss` "hard_negatives" scores are a softmax over background and classes, with "focal" a sigmoid of each class.
    """

    label = "ssd"

    def __init__(
        self, levels: Sequence[Level], config: SSDTask, num_classes: int, short_side: int = anchors.PAPER_SHORT_SIDE
    ) -> None:
        super().__init__(levels, config, num_classes, short_side)
        shares = scales(len(levels), *config.scales, config.first_scale, config.whole_percent)
        ratios = [config.ratios] * len(levels)
        if len(levels) > 3:
            ratios[0] = ratios[-2] = ratios[-1] = config.outer_ratios
        sides = [
            cell_boxes(*pair, level_ratios, config.clip) * short_side
            for pair, level_ratios in zip(pairwise(shares), ratios, strict=True)
        ]
        cells = [anchors.centered(cell, level.stride / 2) for cell, level in zip(sides, levels, strict=True)]
        self.default_boxes = anchors.Grids(levels, cells)
        self.softmax = config.loss == "hard_negatives"
        self.columns = num_classes + self.softmax
        counts = {level: len(cell) for level, cell in zip(levels, sides, strict=True)}
        self.scores, self.deltas = (
            nn.ModuleDict({level.name: nn.Conv2d(level.channels, a * values, 3, padding=1) for level, a in counts.items()})
            for values in (self.columns, 4)
        )

    def init_parameter(self, layer: nn.Module, parameter: Tensor, generator: torch.Generator) -> bool:
        """Leave the weights to Xavier's rule (SSD); with focal loss every class starts with the probability `prior`."""
        if starts := not self.softmax and parameter.dim() == 1 and layer in self.scores.values():
            nn.init.constant_(parameter, prior_bias(self.config.prior))
        return starts

    def forward(self, features: Features) -> tuple[list[Tensor], ...]:
        """Return, for each level, logits of classes (N, Ri, K + 1), or (N, Ri, K) with focal loss, and deltas (N, Ri, 4)."""
        with autocast_off():  # as in the RPN: scores of bf16 would tie
            maps = {level: full_precision(features[level]) for level in self.scores}
            scores = [anchors.flatten_cells(self.scores[level](x), self.columns) for level, x in maps.items()]
            return scores, [anchors.flatten_cells(self.deltas[level](x), 4) for level, x in maps.items()]

    def losses(self, features: Features, targets: Targets, generator: torch.Generator) -> dict[str, Tensor]:
        """Return `class`, of positives and hard negatives or focal of all boxes, and `box`, smooth L1 of the positives: sums
        over the batch divided by its number of positives."""
        default_boxes = torch.cat(self.default_boxes(features))
        logits, deltas = (torch.cat(levels, 1) for levels in self(features))
        matched_idxs, labels = match(default_boxes, targets.boxes, targets.valid, targets.crowd, self.config.positive_iou)
        return self.losses_of(logits, deltas, default_boxes, matched_idxs, labels, targets)

    def losses_of(
        self, logits: Tensor, deltas: Tensor, default_boxes: Tensor, matched_idxs: Tensor, labels: Tensor, targets: Targets
    ) -> dict[str, Tensor]:
        """Return the losses of boxes matched before; shapes as `forward` and `match` return them, all levels together."""
        config = self.config
        image, place = (labels == POSITIVE).nonzero(as_tuple=True)
        objects, normaliser = matched_idxs[image, place], max(len(image), 1)
        target = boxes.encode(targets.boxes[image, objects], default_boxes[place]) / deltas.new_tensor(config.variances)
        box_loss = F.smooth_l1_loss(deltas[image, place], target, beta=config.box_loss_beta, reduction="sum")
        classes = torch.zeros_like(labels, dtype=torch.int64)
        classes[image, place] = targets.labels[image, objects]
        if self.softmax:
            class_loss = F.cross_entropy(logits.flatten(0, 1), classes.flatten(), reduction="none").view_as(classes)
            counted = hard_negatives(class_loss.detach(), labels, config.negatives) | (labels == POSITIVE)
        else:
            is_class = F.one_hot(classes, self.num_classes + 1)[..., 1:].bool()
            class_loss = focal_loss(logits, is_class, config.alpha, config.gamma).sum(-1)
            counted = labels != IGNORED
        return {"class": torch.where(counted, class_loss, 0).sum() / normaliser, "box": box_loss / normaliser}

    def predict(self, features: Features) -> list[tuple[Tensor, Tensor]]:
        """Return scores (N, Ri, K) and boxes (N, Ri, 4) of each level."""
        predictions = []
        for logits, deltas, default_boxes in zip(*self(features), self.default_boxes(features), strict=True):
            score = logits.softmax(-1)[..., 1:] if self.softmax else logits.sigmoid()
            predictions.append((score, boxes.decode(deltas * deltas.new_tensor(self.config.variances), default_boxes)))
        return predictions

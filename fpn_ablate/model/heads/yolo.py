"""YOLOv3's head (Redmon and Farhadi 2018) on any levels: one prior an object, logistic objectness and classes.

Shape letters: N images, L levels, A priors a cell, Hi x Wi cells of level i, R = sum(Hi * Wi * A) priors of an image, G
ground-truth boxes, M matched priors, K classes. Labels are 1..K.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpn_ablate.config.dense import YOLOTask
from fpn_ablate.model import anchors, boxes
from fpn_ablate.model.heads.dense import DenseHead, prior_bias
from fpn_ablate.model.layers import group_norm
from fpn_ablate.model.matching import IGNORED, NEGATIVE, POSITIVE, image_by_image, perhaps_any, too_many_pairs
from fpn_ablate.model.precision import autocast_off, full_precision
from fpn_ablate.structures.instances import Targets
from fpn_ablate.structures.levels import Features, Level

# The short side in pixels of the images that the published priors are for.
PRIOR_SIDE = 416


def spread(priors: Sequence[tuple[float, float]], count: int) -> Tensor:
    """Return `count` priors (count, 2) from any number of them, smallest area first.

    They are read at equal distances in rank, the smallest and the largest included, and between two priors widths and heights
    are interpolated geometrically. As many as there are stay as they are; one alone is the middle one.
    """
    known = torch.tensor(sorted(priors, key=lambda prior: prior[0] * prior[1]), dtype=torch.float64).log()
    last = len(known) - 1
    rank = torch.linspace(0, last, count, dtype=torch.float64) if count > 1 else torch.tensor([last / 2], dtype=torch.float64)
    low = rank.floor().long().clamp(max=max(last - 1, 0))
    share = (rank - low)[:, None]
    return ((1 - share) * known[low] + share * known[(low + 1).clamp(max=last)]).exp().float()


@dataclass(frozen=True)
class Priors:
    """The priors of an image, level by level, row by row, shape by shape.

    Attributes:
        boxes: (R, 4), each in the middle of its cell.
        strides: (R,) of their levels.
        shapes: (L * A, 2), width and height of the A priors of each level, in pixels.
        level_strides, widths, heights, first: (L,), of each level its stride, its map's sides and its first prior's number.
    """

    boxes: Tensor
    strides: Tensor
    shapes: Tensor
    level_strides: Tensor
    widths: Tensor
    heights: Tensor
    first: Tensor


def responsible(priors: Priors, gt_boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the prior (N, G) that predicts each object of (N, G, 4), and their IoU (N, G) with equal centres.

    It has the best shape of all levels, and lies in the cell that has the object's centre.
    """
    sides = gt_boxes[..., 2:] - gt_boxes[..., :2]
    shared = torch.minimum(sides[..., None, :], priors.shapes).prod(-1)  # (N, G, L * A)
    overlap, shape = boxes.iou_from(shared, sides.prod(-1), priors.shapes.prod(-1)).max(-1)
    per_cell = len(priors.shapes) // len(priors.first)
    level, kind = shape // per_cell, shape % per_cell
    cell = (gt_boxes[..., :2] + sides / 2) / priors.level_strides[level][..., None]
    size = torch.stack([priors.widths[level], priors.heights[level]], -1)
    column, row = torch.minimum(cell.floor().long().clamp(min=0), size - 1).unbind(-1)
    return priors.first[level] + (row * priors.widths[level] + column) * per_cell + kind, overlap


def match(
    priors: Priors, gt_boxes: Tensor, valid: Tensor, crowd: Tensor, ignore_iou: float, predicted: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Match priors with ground truth (N, G, 4).

    Positive: the one prior of each object (`responsible`); of several objects with the same one that which it fits best, then
    the first. Ignored: others whose IoU with any object is above `ignore_iou`, or that lie in a crowd region by half of their
    own area. The rest is negative.

    Args:
        predicted: (N, R, 4), boxes whose IoU decides what is ignored (the authors' code); None: that of the priors (the paper).

    Returns:
        matched_idxs (N, R) int64: the object of a positive prior; labels (N, R) int8: POSITIVE, NEGATIVE, IGNORED.
    """
    (n, g), r = valid.shape, len(priors.boxes)
    if g == 0:
        empty = torch.zeros(n, r, dtype=torch.int64, device=gt_boxes.device)
        return empty, empty.to(torch.int8)
    if too_many_pairs(valid, r):
        return image_by_image(
            lambda *image: match(priors, *image[:3], ignore_iou, *image[3:]), gt_boxes, valid, crowd, predicted
        )
    candidates = priors.boxes.expand(n, -1, -1) if predicted is None else predicted
    intersections = boxes.intersection(gt_boxes, candidates)  # (N, G, R)
    area = boxes.area(candidates)
    overlap = boxes.iou_from(intersections, boxes.area(gt_boxes), area).masked_fill_(~valid[..., None], -1)
    labels = torch.full((n, r), NEGATIVE, dtype=torch.int8, device=gt_boxes.device)
    labels.masked_fill_(overlap.amax(1) > ignore_iou, IGNORED)
    if perhaps_any(crowd):
        labels.masked_fill_(((2 * intersections >= area[:, None]) & crowd[..., None]).any(1), IGNORED)
    place, fit = responsible(priors, gt_boxes)
    # An object loses its prior to one that fits better, or that fits as well and comes first.
    number = torch.arange(g, device=place.device)
    better = (fit[:, None] > fit[..., None]) | ((fit[:, None] == fit[..., None]) & (number < number[:, None]))
    loses = (better & (place[:, None] == place[..., None]) & valid[:, None]).any(-1)
    place = torch.where(valid & ~loses, place, r)  # a column for the others, which is cut off
    matched_idxs = torch.zeros(n, r + 1, dtype=torch.int64, device=place.device).scatter_(1, place, number.expand(n, -1))
    positive = torch.zeros(n, r + 1, dtype=torch.bool, device=place.device).scatter_(1, place, True)
    return matched_idxs[:, :r], labels.masked_fill_(positive[:, :r], POSITIVE)


def encode(box: Tensor, prior: Tensor, strides: Tensor) -> tuple[Tensor, Tensor]:
    """Return the place (..., 2) in 0..1 of boxes' centres in their priors' cells, and log(size / prior's) (..., 2)."""
    sides, prior_sides = box[..., 2:] - box[..., :2], prior[..., 2:] - prior[..., :2]
    corner = prior[..., :2] + (prior_sides - strides[..., None]) / 2
    place = (box[..., :2] + sides / 2 - corner) / strides[..., None]
    return place, (sides / prior_sides).log()


def decode(raw: Tensor, prior: Tensor, strides: Tensor) -> Tensor:
    """Return the boxes (..., 4) of t = (t_x, t_y, t_w, t_h): b_xy = sigmoid(t_xy) + cell, b_wh = prior * exp(t_wh)."""
    raw = full_precision(raw)
    prior_sides = prior[..., 2:] - prior[..., :2]
    corner = prior[..., :2] + (prior_sides - strides[..., None]) / 2
    center = corner + raw[..., :2].sigmoid() * strides[..., None]
    half = prior_sides * raw[..., 2:].clamp(max=boxes.MAX_LOG_SCALE).exp() / 2
    return torch.cat([center - half, center + half], -1)


class YOLOHead(DenseHead):
    """On each level a 3x3 convolution to twice its width, then 1x1 convolutions for deltas, objectness and classes; no level
    shares them.

    The priors of all levels are the configured ones, or as many as there must be for these levels (`spread`); the finest level
    has the smallest.
    """

    label = "yolo"

    def __init__(
        self, levels: Sequence[Level], config: YOLOTask, num_classes: int, short_side: int = anchors.PAPER_SHORT_SIDE
    ) -> None:
        super().__init__(levels, config, num_classes, short_side)
        a = config.priors_per_level
        self.shapes = spread(config.priors, a * len(levels)) * short_side / PRIOR_SIDE
        shapes = zip(self.shapes.split(a), levels, strict=True)
        self.boxes = anchors.Grids(levels, [anchors.centered(shape, level.stride / 2) for shape, level in shapes])
        self.convs = nn.ModuleDict({level.name: _convolution(level.channels, config.norm) for level in levels})
        self.deltas, self.objectness, self.scores = (
            nn.ModuleDict({level.name: nn.Conv2d(2 * level.channels, a * values, 1) for level in levels})
            for values in (4, 1, num_classes)
        )

    def init_parameter(self, layer: nn.Module, parameter: Tensor, generator: torch.Generator) -> bool:
        """Draw Gaussian weights of 0.01; every objectness starts at `prior`."""
        if parameter.dim() == 1 and layer in self.objectness.values():
            nn.init.constant_(parameter, prior_bias(self.config.prior))
            return True
        return super().init_parameter(layer, parameter, generator)

    def priors(self, features: Features) -> Priors:
        """Return the priors of an image."""
        levels = self.boxes(features)
        device, counts = levels[0].device, torch.tensor([len(level) for level in levels])
        strides = torch.tensor([level.stride for level in self.levels])
        height, width = torch.tensor([tuple(features[level.name].shape[-2:]) for level in self.levels]).unbind(-1)
        per_level = [strides, width, height, counts.cumsum(0) - counts]
        return Priors(
            torch.cat(levels),
            strides.repeat_interleave(counts).to(device),
            self.shapes.to(device),
            *(x.to(device) for x in per_level),
        )

    def forward(self, features: Features) -> tuple[list[Tensor], ...]:
        """Return, for each level, logits of objectness (N, Ri, 1) and of classes (N, Ri, K), and deltas (N, Ri, 4)."""
        hidden = {level: conv(features[level]) for level, conv in self.convs.items()}
        with autocast_off():  # as in the RPN: scores of bf16 would tie
            hidden = {level: full_precision(x) for level, x in hidden.items()}
            return tuple(
                [anchors.flatten_cells(layers[level](x), values) for level, x in hidden.items()]
                for layers, values in ((self.objectness, 1), (self.scores, self.num_classes), (self.deltas, 4))
            )

    def losses(self, features: Features, targets: Targets, generator: torch.Generator) -> dict[str, Tensor]:
        """Return `objectness` (of all priors that are not ignored), `class` and `box` (of the positives), sums over the batch.

        A box's loss is logistic in the place of its centre and half of the squared error in the logarithms of its sides, which
        has the gradients that the paper states: truth minus prediction.
        """
        config, priors = self.config, self.priors(features)
        objectness, logits, deltas = (torch.cat(levels, 1) for levels in self(features))
        predicted = None
        if config.ignore == "predictions":
            predicted = decode(deltas.detach(), priors.boxes, priors.strides)
        matched_idxs, labels = match(priors, targets.boxes, targets.valid, targets.crowd, config.ignore_iou, predicted)
        positive = labels == POSITIVE
        image, place = positive.nonzero(as_tuple=True)
        objects = matched_idxs[image, place]
        box, sizes = targets.boxes[image, objects], targets.sizes[image]
        objectness_loss = F.binary_cross_entropy_with_logits(
            objectness[..., 0], positive.to(objectness.dtype), reduction="none"
        )
        classes = F.one_hot(targets.labels[image, objects] - 1, self.num_classes).to(logits.dtype)
        class_loss = F.binary_cross_entropy_with_logits(logits[image, place], classes, reduction="sum")
        cell_place, log_sides = encode(box, priors.boxes[place], priors.strides[place])
        raw = deltas[image, place]
        box_loss = F.binary_cross_entropy_with_logits(raw[:, :2], cell_place, reduction="none")
        box_loss = (box_loss + (raw[:, 2:] - log_sides) ** 2 / 2).sum(-1)
        if config.weigh_small:
            box_loss = box_loss * (2 - boxes.area(box) / sizes.prod(-1))
        normaliser = max(len(image), 1) if config.normaliser == "objects" else len(labels)
        return {
            "objectness": torch.where(labels != IGNORED, objectness_loss, 0).sum() / normaliser,
            "class": class_loss / normaliser,
            "box": box_loss.sum() / normaliser,
        }

    def predict(self, features: Features) -> list[tuple[Tensor, Tensor]]:
        """Return scores (N, Ri, K), objectness times class, and boxes (N, Ri, 4) of each level."""
        outputs, priors = self(features), self.priors(features)
        counts = [x.shape[1] for x in outputs[0]]
        levels = zip(*outputs, priors.boxes.split(counts), priors.strides.split(counts), strict=True)
        return [
            (objectness.sigmoid() * logits.sigmoid(), decode(deltas, prior, strides))
            for objectness, logits, deltas, prior, strides in levels
        ]


def _convolution(channels: int, norm: str) -> nn.Sequential:
    norms = {"bn": nn.BatchNorm2d, "gn": group_norm}
    layers = [norms[norm](2 * channels)] if norm != "none" else []
    conv = nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=norm == "none")
    return nn.Sequential(conv, *layers, nn.LeakyReLU(0.1, inplace=True))

"""FCOS's head (Tian et al. 2019): locations inside an object predict the distances to the sides of its box, without anchors.

Shape letters: N images, C channels, Hi x Wi cells of level i, R = sum(Hi * Wi) locations of an image, G ground-truth boxes,
K classes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou_loss

from fpn_ablate.config.dense import FCOSTask
from fpn_ablate.model import anchors, boxes
from fpn_ablate.model.heads.dense import DenseHead, Subnet, prior_bias
from fpn_ablate.model.heads.retinanet import focal_loss
from fpn_ablate.model.matching import IGNORED, NEGATIVE, POSITIVE, image_by_image, too_many_pairs
from fpn_ablate.model.precision import autocast_off, full_precision
from fpn_ablate.structures.instances import Targets
from fpn_ablate.structures.levels import Features, Level, common_width


@dataclass(frozen=True)
class Locations:
    """The locations of an image, level by level, row by row.

    Attributes:
        points: (R, 2), x and y in pixels.
        strides: (R,) of their levels.
        ranges: (R, 2): a location learns an object whose farthest side is between these distances away, in pixels.
    """

    points: Tensor
    strides: Tensor
    ranges: Tensor


def distances(points: Tensor, box: Tensor) -> Tensor:
    """Return the distances (..., 4) of points (..., 2) to the left, top, right and bottom side of boxes (..., 4), in pixels."""
    return torch.cat([points - box[..., :2], box[..., 2:] - points], -1)


def boxes_at(points: Tensor, distance: Tensor) -> Tensor:
    """Return the boxes (..., 4) whose sides lie at distances (..., 4) from points (..., 2): the inverse of `distances`."""
    return torch.cat([points - distance[..., :2], points + distance[..., 2:]], -1)


def centerness(distance: Tensor) -> Tensor:
    """Return how central points are in boxes, from distances (..., 4): 1 at the centre, 0 on a side (their Eq. 3); (...)."""
    low, high = torch.minimum(distance[..., :2], distance[..., 2:]), torch.maximum(distance[..., :2], distance[..., 2:])
    return (low / high).prod(-1).clamp(min=0).sqrt()


def match(locations: Locations, gt_boxes: Tensor, valid: Tensor, crowd: Tensor, radius: float | None) -> tuple[Tensor, Tensor]:
    """Match locations with ground truth (N, G, 4).

    Positive: inside an object whose farthest side is in the range of the location's level; of several objects the smallest
    wins. Ignored: in a crowd's box, unless positive. The rest is negative.

    Args:
        radius: a location must also be less than this many strides away from the object's centre, in x and in y (centre
            sampling); None: anywhere inside.

    Returns:
        matched_idxs (N, R) int64: the object of a positive location; labels (N, R) int8: POSITIVE, NEGATIVE, IGNORED.
    """
    points = locations.points
    if too_many_pairs(valid, len(points)):
        return image_by_image(lambda *image: match(locations, *image, radius), gt_boxes, valid, crowd)
    x, y = points.unbind(-1)
    x1, y1, x2, y2 = gt_boxes[..., None].unbind(-2)  # (N, G, 1)
    sides = x - x1, y - y1, x2 - x, y2 - y  # (N, G, R)
    nearest = torch.minimum(torch.minimum(*sides[:2]), torch.minimum(*sides[2:]))
    farthest = torch.maximum(torch.maximum(*sides[:2]), torch.maximum(*sides[2:]))
    inside = nearest > 0
    fits = inside & (farthest > locations.ranges[:, 0]) & (farthest < locations.ranges[:, 1]) & valid[..., None]
    if radius is not None:
        # As torchvision computes it: a half of the difference of two sides would round otherwise.
        apart = torch.maximum((x - (x1 + x2) / 2).abs(), (y - (y1 + y2) / 2).abs())
        fits &= apart < radius * locations.strides
    area = boxes.area(gt_boxes)[..., None].expand_as(nearest).masked_fill(~fits, torch.inf)
    smallest, matched_idxs = F.pad(area, (0, 0, 0, 1), value=torch.inf).min(1)  # there may be no object
    labels = torch.full_like(matched_idxs, NEGATIVE, dtype=torch.int8)
    labels.masked_fill_((inside & crowd[..., None]).any(1), IGNORED)
    positive = torch.isfinite(smallest)
    return matched_idxs.masked_fill(~positive, 0), labels.masked_fill_(positive, POSITIVE)


def giou_loss(box: Tensor, target: Tensor) -> Tensor:
    """Return 1 - GIoU of pairs of boxes (M, 4): (M,)."""
    return generalized_box_iou_loss(box, target, reduction="none")


def iou_loss(box: Tensor, target: Tensor) -> Tensor:
    """Return -log IoU of pairs of boxes (M, 4): (M,)."""
    shared = boxes.intersection(box[:, None], target[:, None])[:, 0, 0]
    overlap = shared / (boxes.area(box) + boxes.area(target) - shared)
    return -overlap.clamp(min=1e-6).log()


BOX_LOSSES = {"giou": giou_loss, "iou": iou_loss}


class FCOSHead(DenseHead):
    """Two shared subnets, for classes and for distances; centerness beside one of them or nowhere.

    The range of level k ends where that of the next begins: at `range` strides on an input of a short side of 800, and at as
    large a share of any other. The finest level also has all nearer, the coarsest all farther objects.
    """

    label = "fcos"

    def __init__(
        self, levels: Sequence[Level], config: FCOSTask, num_classes: int, short_side: int = anchors.PAPER_SHORT_SIDE
    ) -> None:
        super().__init__(levels, config, num_classes, short_side)
        channels = common_width(levels, "task=fcos")
        self.class_subnet = Subnet(channels, config.convolutions, config.norm, bias=True)
        self.box_subnet = Subnet(channels, config.convolutions, config.norm, bias=True)
        self.scores = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.distances = nn.Conv2d(channels, 4, 3, padding=1)
        self.centerness = None if config.centerness == "none" else nn.Conv2d(channels, 1, 3, padding=1)
        squares = [
            anchors.centered(torch.full((1, 2), float(level.stride)), level.stride / 2 if config.points == "center" else 0.0)
            for level in levels
        ]
        self.squares = anchors.Grids(levels, squares, whole_strides=config.points == "torchvision")
        self.scales = nn.ParameterDict({level.name: torch.ones(()) for level in levels} if config.level_scale else {})

    def init_parameter(self, layer: nn.Module, parameter: Tensor, generator: torch.Generator) -> bool:
        """Draw Gaussian weights of 0.01; every class starts with the probability `prior`."""
        if layer is self.scores and parameter is layer.bias:
            nn.init.constant_(parameter, prior_bias(self.config.prior))
            return True
        return super().init_parameter(layer, parameter, generator)

    def locations(self, features: Features) -> Locations:
        """Return the locations of an image."""
        squares, far = self.squares(features), anchors.scaled(self.config.range, self.short_side)
        parts = []
        for number, (square, level) in enumerate(zip(squares, self.levels, strict=True)):
            low = far * level.stride / 2 if number else 0.0
            high = far * level.stride if number + 1 < len(squares) else math.inf
            points = (square[:, :2] + square[:, 2:]) / 2
            parts.append(
                (points, points.new_full((len(points),), level.stride), points.new_tensor([[low, high]]).expand_as(points))
            )
        return Locations(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def forward(self, features: Features) -> tuple[list[Tensor], ...]:
        """Return, for each level, logits of classes (N, Ri, K), distances (N, Ri, 4) in strides, and logits of centerness
        (N, Ri, 1) unless it is off."""
        config, scores, distance, central = self.config, [], [], []
        for level, x in zip(self.levels, features.values(), strict=True):
            classification, regression = self.class_subnet(x), self.box_subnet(x)
            with autocast_off():  # as in the RPN: scores of bf16 would tie
                classification, regression = full_precision(classification), full_precision(regression)
                scores.append(anchors.flatten_cells(self.scores(classification), self.num_classes))
                raw = anchors.flatten_cells(self.distances(regression), 4)
                raw = raw * self.scales[level.name] if config.level_scale else raw
                distance.append(F.relu(raw) if config.distances == "relu" else raw.clamp(max=boxes.MAX_LOG_SCALE).exp())
                if self.centerness:
                    x = regression if config.centerness == "regression" else classification
                    central.append(anchors.flatten_cells(self.centerness(x), 1))
        return (scores, distance, central) if self.centerness else (scores, distance)

    def losses(self, features: Features, targets: Targets, generator: torch.Generator) -> dict[str, Tensor]:
        """Return `class` (focal, over all locations), `box` and `centerness` (of the positive ones), each a sum over the batch
        divided by its number of positives."""
        config, locations = self.config, self.locations(features)
        matched_idxs, labels = match(locations, targets.boxes, targets.valid, targets.crowd, config.center_sampling)
        logits, distance, *central = (torch.cat(levels, 1) for levels in self(features))
        image, place = (labels == POSITIVE).nonzero(as_tuple=True)
        objects, points = matched_idxs[image, place], locations.points[place]
        box, normaliser = targets.boxes[image, objects], max(len(image), 1)
        is_class = torch.zeros_like(logits, dtype=torch.bool)
        is_class[image, place, targets.labels[image, objects] - 1] = True
        class_loss = focal_loss(logits, is_class, config.alpha, config.gamma)
        central_target = centerness(distances(points, box))
        predicted = boxes_at(points, distance[image, place] * locations.strides[place, None])
        box_loss = BOX_LOSSES[config.box_loss](predicted, box)
        box_normaliser = normaliser
        if config.box_weights == "centerness":
            box_loss, box_normaliser = box_loss * central_target, central_target.sum().clamp(min=1e-6)
        losses = {
            "class": torch.where(labels[..., None] != IGNORED, class_loss, 0).sum() / normaliser,
            "box": box_loss.sum() / box_normaliser,
        }
        if central:
            central_loss = F.binary_cross_entropy_with_logits(central[0][image, place, 0], central_target, reduction="sum")
            losses["centerness"] = central_loss / normaliser
        return losses

    def predict(self, features: Features) -> list[tuple[Tensor, Tensor]]:
        """Return scores (N, Ri, K), of class and centerness together, and boxes (N, Ri, 4) of each level."""
        outputs, locations = self(features), self.locations(features)
        counts = [x.shape[1] for x in outputs[0]]
        levels = zip(*outputs, locations.points.split(counts), self.levels, strict=True)
        predictions = []
        for logits, distance, *central, points, level in levels:
            score = logits.sigmoid()
            if central:
                score = score * central[0].sigmoid()
                score = score.sqrt() if self.config.score == "sqrt" else score
            predictions.append((score, boxes_at(points, distance * level.stride)))
        return predictions

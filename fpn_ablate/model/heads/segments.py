"""Segment proposals over any set of levels (Sec. 6, appendix A).

Shape letters: N images, C channels, Hi x Wi cells of level i, A scales a cell, Q regions of an image (one for each MLP, cell
and scale), G ground-truth objects, S sampled regions of an image, P proposals, W x W cells of an MLP's window, K windows,
M positive regions of a batch, R x R bins of a mask.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpn_ablate.config.tasks import SegmentProposalsTask
from fpn_ablate.model import anchors, boxes
from fpn_ablate.model.matching import IGNORED, NEGATIVE, POSITIVE, image_by_image, sample, too_many_pairs
from fpn_ablate.model.precision import autocast_off, full_precision
from fpn_ablate.structures.instances import Proposals, Targets
from fpn_ablate.structures.levels import Features, Level, common_width
from fpn_ablate.structures.masks import crop

# Shapes of batches whose regions are kept, as in `heads.rpn`.
MAX_GRIDS = 32


@dataclass(frozen=True)
class Regions:
    """The regions of an image, MLP by MLP, level by level, row by row, scale by scale.

    Attributes:
        boxes: (Q, 4), squares that reach beyond their scale by the padding.
        centers: (Q, 2), x and y of their cells.
        strides: (Q,) of their levels.
        scale_idxs: (Q,) into `scales`.
        scales: of all MLPs, in pixels of the input.
    """

    boxes: Tensor
    centers: Tensor
    strides: Tensor
    scale_idxs: Tensor
    scales: Tensor


def match(
    regions: Regions,
    gt_boxes: Tensor,
    valid: Tensor,
    crowd: Tensor,
    sizes: Tensor,
    distance: str = "max",
    winner: str = "nearest",
) -> tuple[Tensor, Tensor]:
    """Match regions with ground truth (N, G, 4) in images of `sizes` (N, 2).

    An object belongs to the one of the scales that is nearest to max(width, height) in log space. Positive: a region of this
    scale whose cell lies within its stride 2^k of the object's centre. Ignored: cells in a crowd's box or beside the image,
    unless positive. The rest is negative.

    Args:
        distance: "max" of the distances in x and y, or "euclidean".
        winner: of several objects that a region fits: "nearest" centre, or "smallest".

    Returns:
        matched_idxs (N, Q) int64: the object of a positive region; labels (N, Q) int8: POSITIVE, NEGATIVE, IGNORED.
    """
    if too_many_pairs(valid, len(regions.centers)):
        return image_by_image(lambda *image: match(regions, *image, distance, winner), gt_boxes, valid, crowd, sizes)
    sides = gt_boxes[..., 2:] - gt_boxes[..., :2]
    centers = gt_boxes[..., :2] + sides / 2
    extent = sides.amax(-1).clamp(min=1e-6)  # padding boxes have no size
    gt_scale_idxs = (extent.log()[..., None] - regions.scales.log()).abs().argmin(-1)
    x, y = (centers[:, :, None] - regions.centers).abs().unbind(-1)  # (N, G, Q)
    apart = torch.maximum(x, y) if distance == "max" else torch.hypot(x, y)
    fits = valid[..., None] & (gt_scale_idxs[..., None] == regions.scale_idxs) & (apart <= regions.strides)
    cost = apart if winner == "nearest" else boxes.area(gt_boxes)[..., None].expand_as(apart)
    cost = F.pad(cost.masked_fill(~fits, torch.inf), (0, 0, 0, 1), value=torch.inf)  # there may be no object
    best, matched_idxs = cost.min(1)
    labels = torch.full_like(matched_idxs, NEGATIVE, dtype=torch.int8)
    center = regions.centers[:, None]
    in_crowd = ((center >= gt_boxes[:, None, :, :2]) & (center <= gt_boxes[:, None, :, 2:])).all(-1) & crowd[:, None]
    labels.masked_fill_(in_crowd.any(-1) | beside(regions.centers, sizes), IGNORED)
    return matched_idxs, labels.masked_fill_(torch.isfinite(best), POSITIVE)


def beside(centers: Tensor, sizes: Tensor) -> Tensor:
    """Return which of the cells at `centers` (Q, 2) lie in the padding of images of `sizes` (N, 2): (N, Q)."""
    return (centers >= sizes.flip(-1)[:, None]).any(-1)


def gather_windows(maps: Sequence[Tensor], image: Tensor, cell: Tensor, window: int) -> Tensor:
    """Return the W x W cells around each of `cell` (K,) of `image` (K,): (K, W * W, C), 0 outside of a map.

    Args:
        maps: of all levels, of one width. Their cells are numbered row by row, and consecutively across levels.
        window: W.
    """
    border, tables, first_cell, first_row = window // 2, [], 0, 0
    corner, row_length = torch.zeros_like(cell), torch.ones_like(cell)
    for x in maps:
        height, width = x.shape[-2:]
        padded = F.pad(x, [border] * 4)
        y, x_of_cell = (cell - first_cell) // width, (cell - first_cell) % width
        top_left = first_row + (image * padded.shape[2] + y) * padded.shape[3] + x_of_cell
        on_level = (cell >= first_cell) & (cell < first_cell + height * width)
        corner = torch.where(on_level, top_left, corner)
        row_length = torch.where(on_level, padded.shape[3], row_length)
        tables.append(padded.permute(0, 2, 3, 1).flatten(0, 2))
        first_cell, first_row = first_cell + height * width, first_row + len(tables[-1])
    step = torch.arange(window, device=cell.device)
    rows = corner[:, None, None] + step[:, None] * row_length[:, None, None] + step
    return torch.cat(tables).index_select(0, rows.flatten()).view(len(cell), window**2, tables[0].shape[1])


class SegmentMLP(nn.Module):
    """W x W convolution, then sibling 1x1 convolutions for A scores and A masks a cell; all levels share one MLP."""

    def __init__(self, channels: int, window: int, num_scales: int, config: SegmentProposalsTask) -> None:
        super().__init__()
        self.window, self.activation = window, F.relu if config.relu else nn.Identity()
        self.mask_shape = num_scales, config.mask, config.mask
        self.conv = nn.Conv2d(channels, config.hidden, window, padding=window // 2)
        self.score = nn.Conv2d(config.hidden, num_scales, 1)
        self.mask = nn.Conv2d(config.hidden, math.prod(self.mask_shape), 1)

    def forward(self, features: Features) -> list[Tensor]:
        """Return the logits (N, Hi * Wi * A) of the scores of each level."""
        hidden = [self.activation(self.conv(x)) for x in features.values()]
        with autocast_off():  # as in the RPN: scores of bf16 would tie
            return [anchors.flatten_cells(self.score(full_precision(x)), 1)[..., 0] for x in hidden]

    def of_windows(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of scores (K, A) and masks (K, A, R, R) of windows (K, W * W, C)."""
        hidden = self.activation(F.linear(windows.flatten(1), self.conv.weight.permute(0, 2, 3, 1).flatten(1), self.conv.bias))
        with autocast_off():
            hidden = full_precision(hidden)
            score, mask = (F.linear(hidden, layer.weight.flatten(1), layer.bias) for layer in (self.score, self.mask))
        return score, mask.unflatten(1, self.mask_shape)


class SegmentHead(nn.Module):
    """Regions, MLPs, losses and proposals. A pyramid's coarsest levels are not used where there are fewer scales.

    Masks, and in training scores too, are computed at the cells that are read.

    Args:
        levels: of the neck.
        short_side: of the input in pixels; the configured scales are those of a short side of 800.
    """

    def __init__(
        self, levels: Sequence[Level], config: SegmentProposalsTask, short_side: int = anchors.PAPER_SHORT_SIDE
    ) -> None:
        super().__init__()
        self.levels, self.config = tuple(levels), config
        scales = [anchors.scaled(scale, short_side) for scale in config.scales]
        self.level_scales = anchors.sizes_per_level(levels, scales)
        ratios = {"5": 1.0, "7": config.ratio_7x7}
        self.ratios = ratios if config.mlp == "dual" else {str(config.mlp): ratios[str(config.mlp)]}
        self.num_scales = len(self.level_scales[0])
        channels = common_width(levels, "task=segment_proposals")
        self.mlps = nn.ModuleDict(
            {window: SegmentMLP(channels, int(window), self.num_scales, config) for window in self.ratios}
        )
        self._grids: dict[tuple, Regions] = {}

    @property
    def label(self) -> str:
        """Return its name in tables: the windows of its MLPs, and the scales a cell where there are several."""
        windows = ", ".join(f"{window}x{window}" for window in self.mlps)
        return windows + (f", {self.num_scales} scales" if self.num_scales > 1 else "")

    def init_parameter(self, layer: nn.Module, parameter: Tensor, generator: torch.Generator) -> bool:
        """Draw Gaussian weights of 0.01, unless Xavier's are wanted."""
        if draws := parameter.dim() > 1 and self.config.init == "gaussian":
            nn.init.normal_(parameter, std=0.01, generator=generator)
        return draws

    def regions(self, features: Features) -> Regions:
        """Return the regions of an image, cached for the last MAX_GRIDS shapes."""
        maps = self._maps(features)
        shape = (*(tuple(x.shape[-2:]) for x in maps), maps[0].device)
        if shape not in self._grids:
            if len(self._grids) == MAX_GRIDS:
                del self._grids[next(iter(self._grids))]
            self._grids[shape] = self._make_regions(maps)
        return self._grids[shape]

    def _make_regions(self, maps: Sequence[Tensor]) -> Regions:
        parts: list[tuple[Tensor, ...]] = []
        all_scales: list[float] = []
        for ratio in self.ratios.values():
            for level, level_scales, x in zip(self.levels, self.level_scales, maps, strict=False):
                scales, strides, size = [scale * ratio for scale in level_scales], (level.stride, level.stride), x.shape[-2:]
                squares = anchors.cell_anchors([scale * (1 + self.config.padding) for scale in scales], [1.0]).to(x.device)
                centers = anchors.grid(squares * 0, strides, *size)[:, :2]
                scale_idxs = torch.arange(len(scales), device=x.device).repeat(size.numel()) + len(all_scales)
                strides_of_regions = torch.full_like(scale_idxs, level.stride)
                parts.append((anchors.grid(squares, strides, *size), centers, strides_of_regions, scale_idxs))
                all_scales += scales
        columns = (torch.cat(column) for column in zip(*parts, strict=True))
        return Regions(*columns, scales=torch.tensor(all_scales, device=maps[0].device))

    def _maps(self, features: Features) -> list[Tensor]:
        """Return the levels that have regions."""
        return list(features.values())[: len(self.level_scales)]

    def forward(self, features: Features) -> Tensor:
        """Return the logits (N, Q) of the scores of all regions."""
        features = dict(list(features.items())[: len(self.level_scales)])
        return torch.cat([score for mlp in self.mlps.values() for score in mlp(features)], 1)

    def predict_at(self, features: Features, idxs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of scores (N, S) and masks (N, S, R, R) of the regions `idxs` (N, S)."""
        maps = self._maps(features)
        regions_of_mlp = sum(x.shape[-2] * x.shape[-1] for x in maps) * self.num_scales
        image = torch.arange(len(idxs), device=idxs.device).repeat_interleave(idxs.shape[1])
        number, region = (idxs // regions_of_mlp).flatten(), (idxs % regions_of_mlp).flatten()
        parts, order = [], []
        for k, mlp in enumerate(self.mlps.values()):
            rows = (number == k).nonzero()[:, 0]
            windows = gather_windows(maps, image[rows], region[rows] // self.num_scales, mlp.window)
            score, mask = mlp.of_windows(windows)
            scale = torch.arange(len(rows), device=rows.device), region[rows] % self.num_scales
            parts.append((score[scale], mask[scale]))
            order.append(rows)
        back = torch.cat(order).argsort()
        score, mask = (torch.cat(column)[back].unflatten(0, idxs.shape) for column in zip(*parts, strict=True))
        return score, mask

    def losses(self, features: Features, targets: Targets, generator: torch.Generator) -> dict[str, Tensor]:
        """Return `segment_score` (logistic, over the sampled regions) and `segment_mask` (of the positives), in fp32."""
        assert targets.masks is not None, "segment proposals learn from masks"
        config, regions = self.config, self.regions(features)
        matched_idxs, labels = match(
            regions,
            targets.boxes,
            targets.valid,
            targets.crowd,
            targets.sizes,
            config.distance,
            config.winner,
        )
        idxs, sampled_mask = sample(labels, config.samples, config.positive_fraction, generator)
        score, mask = self.predict_at(features, idxs)
        positive = sampled_mask & (labels.gather(1, idxs) == POSITIVE)
        score_loss = F.binary_cross_entropy_with_logits(score, positive.to(score.dtype), reduction="none")
        image, place = positive.nonzero(as_tuple=True)
        region = idxs[image, place]
        target = crop(targets.masks, image, matched_idxs[image, region], regions.boxes[region], config.mask)
        examples = sampled_mask.sum().clamp(min=1)
        averaged = positive.sum().clamp(min=1) if config.mask_average == "positives" else examples
        mask_loss = self.mask_losses(mask[image, place], (target >= 0.5).to(mask.dtype)).sum() / averaged
        return {
            "segment_score": torch.where(sampled_mask, score_loss, 0).sum() / examples,
            "segment_mask": config.mask_weight * mask_loss,
        }

    def mask_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss (M,) of each mask, from logits and targets (M, R, R)."""
        if self.config.mask_loss == "dice":
            probability = logits.sigmoid()
            return 1 - 2 * (probability * target).sum((1, 2)) / (probability**2 + target**2).sum((1, 2))
        loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        return loss.mean((1, 2)) if self.config.mask_loss == "logistic" else loss.sum((1, 2))

    @torch.no_grad()
    def propose(self, features: Features, sizes: Tensor) -> Proposals:
        """Propose the best regions of images of `sizes` (N, 2), with their masks, best first; no NMS."""
        regions, score = self.regions(features), self(features)
        score = score.masked_fill(beside(regions.centers, sizes), -torch.inf)
        score, idxs = score.topk(min(self.config.proposals, score.shape[1]))
        _, mask = self.predict_at(features, idxs)
        return Proposals(regions.boxes[idxs], score.sigmoid(), torch.isfinite(score), mask.sigmoid())

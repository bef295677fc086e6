"""Region proposal network over any set of levels (Sec. 4.1).

N images, L levels, A anchors a cell, R = sum(Hi * Wi * A) anchors, G ground-truth boxes, P proposals.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import nms

from fpn_ablate.model import anchors as anchor_grid
from fpn_ablate.model import boxes
from fpn_ablate.model.assign import POSITIVE, match, sample
from fpn_ablate.model.levels import Features, Level
from fpn_ablate.model.linear import linear


@dataclass(frozen=True)
class Targets:
    """Ground truth of a batch: boxes (N, G, 4), labels (N, G) in 1..K, valid (N, G) and crowd (N, G) bool; sizes (N, 2) of the
    images."""

    boxes: Tensor
    labels: Tensor
    valid: Tensor
    crowd: Tensor
    sizes: Tensor


@dataclass(frozen=True)
class Proposals:
    """Proposals of a batch, best first: boxes (N, P, 4), scores (N, P) in 0..1, valid (N, P) bool (the rest is padding)."""

    boxes: Tensor
    scores: Tensor
    valid: Tensor


@dataclass(frozen=True)
class RPNSettings:
    """Numbers of the RPN. Sizes in pixels of the network's input; pairs are (training, test)."""

    sizes: tuple[float, ...] = (32, 64, 128, 256, 512)
    ratios: tuple[float, ...] = (0.5, 1, 2)
    anchor_grid: str = "exact"  # or "torchvision"; see `RPN.anchors`
    positive_iou: float = 0.7
    negative_iou: float = 0.3
    samples: int = 256
    positive_fraction: float = 0.5
    pre_nms_topk: tuple[int, int] = (2000, 1000)  # a level of a pyramid
    pre_nms_topk_single: tuple[int, int] = (12000, 6000)  # the one level of a single map
    post_nms_topk: tuple[int, int] = (2000, 1000)  # an image
    nms_thresh: float = 0.7
    box_loss_beta: float = 1 / 9


class RPNHead(nn.Module):
    """3x3 convolution with ReLU, then sibling 1x1 objectness and box deltas; one head shared over all levels."""

    def __init__(self, channels: int, num_anchors: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.objectness = nn.Conv2d(channels, num_anchors, 1)
        self.deltas = nn.Conv2d(channels, 4 * num_anchors, 1)

    def forward(self, features: Features) -> tuple[list[Tensor], list[Tensor]]:
        """Per level: objectness (N, Ri) and deltas (N, Ri, 4), in anchor order."""
        hidden = [F.relu(self.conv(x)) for x in features.values()]
        # In fp32 also under autocast: bf16 has so few values that the best scores would tie by the hundred.
        with torch.autocast("cuda", enabled=False):
            objectness = [anchor_grid.flatten_cells(self.objectness(x.float()), 1)[..., 0] for x in hidden]
            return objectness, [anchor_grid.flatten_cells(self.deltas(x.float()), 4) for x in hidden]

    def at(self, features: Features, idxs: Tensor) -> tuple[Tensor, Tensor]:
        """Objectness (N, S) and deltas (N, S, 4) of the anchors `idxs` (N, S) alone, as `forward` gives them.

        The losses look at 256 anchors of an image's many thousands, and nothing else of the head's output has a gradient.
        """
        num_anchors = self.objectness.out_channels
        cell, anchor = idxs // num_anchors, (idxs % num_anchors).flatten()
        around = F.relu(linear(_around(features, cell), self.conv.weight.permute(0, 2, 3, 1).flatten(1), self.conv.bias))
        with torch.autocast("cuda", enabled=False):
            around = around.float()
            objectness = linear(around, self.objectness.weight.flatten(1), self.objectness.bias)
            deltas = linear(around, self.deltas.weight.flatten(1), self.deltas.bias).view(-1, num_anchors, 4)
        one = torch.arange(len(anchor), device=anchor.device)
        return objectness[one, anchor].view_as(idxs), deltas[one, anchor].view(*idxs.shape, 4)


def _around(features: Features, cell: Tensor) -> Tensor:
    """(N * S, 9 * C): the 3x3 cells around each of `cell` (N, S), counted over the levels, row by row; 0 outside a map."""
    maps = list(features.values())
    sizes = torch.tensor([x.shape[-2:] for x in maps], device=cell.device)
    ends = sizes.prod(1).cumsum(0)
    level = torch.searchsorted(ends, cell, right=True)
    height, width = sizes[level].unbind(-1)
    first = (ends - sizes.prod(1))[level]  # cell of its level
    inside = cell - first
    step = torch.arange(-1, 2, device=cell.device)
    y, x = (inside // width)[..., None, None] + step[:, None], (inside % width)[..., None, None] + step
    height, width = height[..., None, None], width[..., None, None]
    within = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    # All cells in one table, map by map, and a last row of zeros for what is outside.
    c, images = maps[0].shape[1], torch.arange(len(cell), device=cell.device)[:, None, None, None]
    table = torch.cat([*(m.permute(0, 2, 3, 1).reshape(-1, c) for m in maps), maps[0].new_zeros(1, c)])
    rows = torch.where(within, len(cell) * first[..., None, None] + (images * height + y) * width + x, len(table) - 1)
    return F.embedding(rows.view(-1, 9), table).flatten(1)


class RPN(nn.Module):
    def __init__(self, levels: Sequence[Level], settings: RPNSettings) -> None:
        super().__init__()
        self.levels, self.settings = tuple(levels), settings
        self.level_sizes = anchor_grid.sizes_per_level(levels, settings.sizes)
        self.head = RPNHead(levels[0].channels, len(self.level_sizes[0]) * len(settings.ratios))
        self._grids: dict[tuple, list[Tensor]] = {}

    def anchors(self, features: Features) -> list[Tensor]:
        """Per level (Ri, 4). Kept for the last shape: batches of one size need them once.

        With `anchor_grid` "torchvision", as in torchvision: corners rounded to whole pixels, and strides that are the image's
        sides divided by the map's, without remainder. Where a map's side was rounded up (P6 of an 800 px side has 13 cells),
        that is a stride of 61 px in place of 64, and anchors that lie up to 36 px off their cells.
        """
        used = list(features.values())[: len(self.level_sizes)]
        shape = (*(tuple(x.shape[-2:]) for x in used), used[0].device)
        if shape not in self._grids:
            self._grids = {
                shape: [self._grid(*level, used) for level in zip(self.levels, self.level_sizes, used, strict=False)]
            }
        return self._grids[shape]

    def _grid(self, level: Level, sizes: Sequence[float], x: Tensor, used: Sequence[Tensor]) -> Tensor:
        height, width = x.shape[-2:]
        theirs, strides = self.settings.anchor_grid == "torchvision", (level.stride, level.stride)
        if theirs:
            # The finest map divides the padded image without remainder.
            strides = tuple(
                side * self.levels[0].stride // own for side, own in zip(used[0].shape[-2:], (height, width), strict=True)
            )
        cells = anchor_grid.cell_anchors(sizes, self.settings.ratios, whole=theirs)
        return anchor_grid.grid(cells.to(x.device), strides, height, width)

    def forward(self, features: Features) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Per level: objectness (N, Ri), deltas (N, Ri, 4), anchors (Ri, 4)."""
        features = self._read(features)
        return *self.head(features), self.anchors(features)

    def _read(self, features: Features) -> Features:
        """The levels that have anchors."""
        return dict(list(features.items())[: len(self.level_sizes)])

    def losses(self, features: Features, targets: Targets, generator: torch.Generator) -> dict[str, Tensor]:
        """`rpn_objectness` (binary cross-entropy) and `rpn_box` (smooth L1), both over the sampled anchors, in fp32."""
        features = self._read(features)
        every = torch.cat(self.anchors(features))
        matched_idxs, labels = match(
            every,
            targets.boxes,
            targets.valid,
            targets.crowd,
            self.settings.positive_iou,
            self.settings.negative_iou,
        )
        idxs, chosen = sample(labels, self.settings.samples, self.settings.positive_fraction, generator)
        score, delta = self.head.at(features, idxs)
        positive = chosen & (labels.gather(1, idxs) == POSITIVE)
        normaliser = chosen.sum().clamp(min=1)
        objectness_loss = F.binary_cross_entropy_with_logits(score, positive.float(), reduction="none")
        if targets.boxes.shape[1]:
            own = matched_idxs.gather(1, idxs)[..., None].expand(-1, -1, 4)
            wanted = boxes.encode(targets.boxes.gather(1, own), every[idxs])
            box_loss = F.smooth_l1_loss(delta, wanted, beta=self.settings.box_loss_beta, reduction="none").sum(-1)
        else:
            box_loss = delta.sum(-1) * 0
        # `where`, not a product: what is not chosen may be infinite (padding boxes have no size).
        return {
            "rpn_objectness": torch.where(chosen, objectness_loss, 0).sum() / normaliser,
            "rpn_box": torch.where(positive, box_loss, 0).sum() / normaliser,
        }

    @torch.no_grad()
    def propose(
        self, objectness: list[Tensor], deltas: list[Tensor], anchors: list[Tensor], sizes: Tensor, to_train: bool
    ) -> Proposals:
        """Top-k of each level, clipping to `sizes` (N, 2), NMS per level, top-k over all levels; `to_train`: as many of them as
        a second stage is trained on."""
        s, mode = self.settings, 0 if to_train else 1
        pre = (s.pre_nms_topk_single if len(anchors) == 1 else s.pre_nms_topk)[mode]
        per_level = []
        for score, delta, anchor in zip(objectness, deltas, anchors, strict=True):
            top, idxs = score.float().topk(min(pre, score.shape[1]), dim=1)
            box = boxes.decode(delta.gather(1, idxs[..., None].expand(-1, -1, 4)), anchor[idxs])
            per_level.append((boxes.clip(box, sizes), top))
        kept, count = [], s.post_nms_topk[mode] * 5 // 4
        for i in range(len(sizes)):
            *found, count = self._suppress([(b[i], t[i]) for b, t in per_level], s.post_nms_topk[mode], count)
            kept.append(found)
        most = max(len(score) for _, score in kept)
        box = torch.stack([F.pad(b, (0, 0, 0, most - len(b))) for b, _ in kept])
        score = torch.stack([F.pad(t, (0, most - len(t)), value=-torch.inf) for _, t in kept])
        return Proposals(box, score.sigmoid(), torch.isfinite(score))

    def _suppress(self, levels: list[tuple[Tensor, Tensor]], topk: int, count: int) -> tuple[Tensor, Tensor, int]:
        """One image's levels [(boxes (K, 4), logits (K,))], best first, -> what NMS leaves of each, together: the best `topk`.

        NMS of the best boxes is the beginning of NMS of all, and its time grows with the square of their number. So the best
        `count` of all levels are tried first; returned is also how many it took.
        """
        scores = torch.cat([t for _, t in levels])
        while True:
            whole = count >= len(scores) or scores.is_cuda  # a GPU would wait for each answer
            least = -torch.inf if whole else scores.topk(count).values[-1]
            box, score = zip(*(self._nms(b, t, least) for b, t in levels), strict=True)
            box, score = torch.cat(box), torch.cat(score)
            solid = (box[:, 2] > box[:, 0]) & (box[:, 3] > box[:, 1])  # clipping can empty a box
            box, score = box[solid], score[solid]
            if whole or len(score) >= topk:
                score, order = score.topk(min(topk, len(score)))
                return box[order], score, count
            count = max(count * topk // max(len(score), 1), count) + topk // 8 + 1

    def _nms(self, box: Tensor, score: Tensor, least: Tensor | float) -> tuple[Tensor, Tensor]:
        """What NMS leaves of boxes (K, 4) that come best first and score at `least` so much."""
        among = slice(None if least == -torch.inf else int((score >= least).sum()))
        box, score = box[among], score[among]
        keep = nms(box, score, self.settings.nms_thresh)
        return box[keep], score[keep]

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
from fpn_ablate.model.matching import POSITIVE, match, sample
from fpn_ablate.model.ops.onednn import linear
from fpn_ablate.model.ops.sparse_conv import conv3x3_at, gather_3x3
from fpn_ablate.structures.instances import Proposals, Targets
from fpn_ablate.structures.levels import Features, Level


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
        hidden = F.relu(conv3x3_at(gather_3x3(list(features.values()), cell), self.conv))
        with torch.autocast("cuda", enabled=False):
            hidden = hidden.float()
            objectness = linear(hidden, self.objectness.weight.flatten(1), self.objectness.bias)
            deltas = linear(hidden, self.deltas.weight.flatten(1), self.deltas.bias).view(-1, num_anchors, 4)
        one = torch.arange(len(anchor), device=anchor.device)
        return objectness[one, anchor].view_as(idxs), deltas[one, anchor].view(*idxs.shape, 4)


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

    @property
    def cells_read(self) -> int:
        """Of an image's cells the losses look at so many at most: those around each sampled anchor."""
        return 9 * self.settings.samples

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
        topk = s.post_nms_topk[mode]
        count = topk * 5 // 4 if sizes.device.type == "cpu" else pre * len(anchors)  # a GPU would wait to be told what is left
        kept = self._best(list(zip(objectness, deltas, anchors, strict=True)), sizes, pre, topk, count)
        most = max(len(score) for _, score in kept)
        box = torch.stack([F.pad(b, (0, 0, 0, most - len(b))) for b, _ in kept])
        score = torch.stack([F.pad(t, (0, most - len(t)), value=-torch.inf) for _, t in kept])
        return Proposals(box, score.sigmoid(), torch.isfinite(score))

    def _best(
        self, levels: list[tuple[Tensor, Tensor, Tensor]], sizes: Tensor, pre: int, topk: int, count: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Of each image the best `topk` boxes (K, 4) and logits (K,) that NMS leaves of the best `pre` of each level: of its
        objectness (N, Ri), deltas (N, Ri, 4) and anchors (Ri, 4).

        NMS of the best boxes is the beginning of NMS of all, and its time grows with the square of their number. So the best
        `count` of all levels together are tried first, and more for the images where too few are left.
        """
        best = []
        for score, delta, anchor in levels:
            top, idxs = score.float().topk(min(pre, count, score.shape[1]), dim=1)
            box = boxes.decode(delta.gather(1, idxs[..., None].expand(-1, -1, 4)), anchor[idxs])
            best.append((boxes.clip(box, sizes), top))
        every, lengths = sum(min(pre, len(anchor)) for *_, anchor in levels), [[len(top[0]) for _, top in best]] * len(sizes)
        if count < every:
            least = torch.cat([top for _, top in best], 1).topk(count).values[:, -1:]
            lengths = torch.stack([(top >= least).sum(1) for _, top in best], 1).tolist()
        kept = [
            self._suppress([(b[i, :k], t[i, :k]) for (b, t), k in zip(best, lengths[i], strict=True)], topk)
            for i in range(len(sizes))
        ]
        short = [i for i, (_, score) in enumerate(kept) if len(score) < topk]
        if short and count < every:
            fewest = max(min(len(kept[i][1]) for i in short), 1)
            more = count * topk // fewest + topk // 8 + 1
            few = [(score[short], delta[short], anchor) for score, delta, anchor in levels]
            for i, found in zip(short, self._best(few, sizes[short], pre, topk, more), strict=True):
                kept[i] = found
        return kept

    def _suppress(self, levels: list[tuple[Tensor, Tensor]], topk: int) -> tuple[Tensor, Tensor]:
        """One image's levels [(boxes (K, 4), logits (K,))] -> what NMS leaves of each, together, best first, at most `topk`."""
        keeps = [nms(box, score, self.settings.nms_thresh) for box, score in levels]
        pairs = list(zip(levels, keeps, strict=True))
        box, score = torch.cat([b[keep] for (b, _), keep in pairs]), torch.cat([t[keep] for (_, t), keep in pairs])
        solid = (box[:, 2] > box[:, 0]) & (box[:, 3] > box[:, 1])  # clipping can empty a box
        box, score = box[solid], score[solid]
        score, order = score.topk(min(topk, len(score)))
        return box[order], score

"""Region proposal network over any set of levels (Sec. 4.1).

Shape letters: N images, L levels, A anchors a cell, Hi x Wi cells of level i, Ri = Hi * Wi * A, R = sum of Ri anchors an image,
G ground-truth boxes, S sampled anchors an image, P proposals, K boxes of one image that are being selected.
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
    anchor_grid: str = "exact"  # or "torchvision": `RPN.anchors`
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
    """3x3 convolution with ReLU, then sibling 1x1 convolutions for objectness and box deltas; all levels share one head."""

    def __init__(self, channels: int, num_anchors: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.objectness = nn.Conv2d(channels, num_anchors, 1)
        self.deltas = nn.Conv2d(channels, 4 * num_anchors, 1)

    def forward(self, features: Features) -> tuple[list[Tensor], list[Tensor]]:
        """Return, for each level, objectness (N, Ri) and deltas (N, Ri, 4), in the order of the anchors."""
        hidden = [F.relu(self.conv(x)) for x in features.values()]
        # In fp32 also under autocast: bf16 has so few values that hundreds of the best scores would tie.
        with torch.autocast("cuda", enabled=False):
            objectness = [anchor_grid.flatten_cells(self.objectness(x.float()), 1)[..., 0] for x in hidden]
            return objectness, [anchor_grid.flatten_cells(self.deltas(x.float()), 4) for x in hidden]

    def forward_at(self, features: Features, idxs: Tensor) -> tuple[Tensor, Tensor]:
        """Return objectness (N, S) and deltas (N, S, 4) of the anchors `idxs` (N, S) alone, equal to those of `forward`.

        The losses read 256 of an image's many thousand anchors, and nothing else of the head's output has a gradient.
        """
        num_anchors = self.objectness.out_channels
        cell, anchor = idxs // num_anchors, (idxs % num_anchors).flatten()
        hidden = F.relu(conv3x3_at(gather_3x3(list(features.values()), cell), self.conv))
        with torch.autocast("cuda", enabled=False):
            hidden = hidden.float()
            objectness = linear(hidden, self.objectness.weight.flatten(1), self.objectness.bias)
            deltas = linear(hidden, self.deltas.weight.flatten(1), self.deltas.bias).view(-1, num_anchors, 4)
        row = torch.arange(len(anchor), device=anchor.device)
        return objectness[row, anchor].view_as(idxs), deltas[row, anchor].view(*idxs.shape, 4)


class RPN(nn.Module):
    """Anchors, head, losses and proposals. A pyramid's coarsest levels are not used where there are fewer anchor sizes."""

    def __init__(self, levels: Sequence[Level], settings: RPNSettings) -> None:
        super().__init__()
        self.levels, self.settings = tuple(levels), settings
        self.level_sizes = anchor_grid.sizes_per_level(levels, settings.sizes)
        self.head = RPNHead(levels[0].channels, len(self.level_sizes[0]) * len(settings.ratios))
        self._grids: dict[tuple, list[Tensor]] = {}

    def anchors(self, features: Features) -> list[Tensor]:
        """Return the anchors (Ri, 4) of each level, cached for the last shape: batches of one size compute them once.

        With `anchor_grid` "torchvision", as in torchvision: corners rounded to whole pixels, and strides that are the image's
        sides divided by the map's, without remainder. Where a map's side was rounded up (P6 of an 800 px side has 13 cells),
        that is a stride of 61 px in place of 64, and anchors that lie up to 36 px off their cells.
        """
        maps = list(features.values())[: len(self.level_sizes)]
        shape = (*(tuple(x.shape[-2:]) for x in maps), maps[0].device)
        if shape not in self._grids:
            self._grids = {
                shape: [self._grid(*level, maps) for level in zip(self.levels, self.level_sizes, maps, strict=False)]
            }
        return self._grids[shape]

    def _grid(self, level: Level, sizes: Sequence[float], x: Tensor, maps: Sequence[Tensor]) -> Tensor:
        height, width = x.shape[-2:]
        like_torchvision, strides = self.settings.anchor_grid == "torchvision", (level.stride, level.stride)
        if like_torchvision:
            # The finest map divides the padded image without remainder.
            strides = tuple(
                side * self.levels[0].stride // cells for side, cells in zip(maps[0].shape[-2:], (height, width), strict=True)
            )
        base_anchors = anchor_grid.cell_anchors(sizes, self.settings.ratios, round_to_pixels=like_torchvision)
        return anchor_grid.grid(base_anchors.to(x.device), strides, height, width)

    def forward(self, features: Features) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return, for each level, objectness (N, Ri), deltas (N, Ri, 4) and anchors (Ri, 4)."""
        features = self._with_anchors(features)
        return *self.head(features), self.anchors(features)

    @property
    def max_sampled_cells(self) -> int:
        """Return how many cells of an image the losses read at most: the 3x3 around each sampled anchor."""
        return 9 * self.settings.samples

    def _with_anchors(self, features: Features) -> Features:
        """Return the levels that have anchors."""
        return dict(list(features.items())[: len(self.level_sizes)])

    def losses(self, features: Features, targets: Targets, generator: torch.Generator) -> dict[str, Tensor]:
        """Return `rpn_objectness` (binary cross-entropy) and `rpn_box` (smooth L1), both over the sampled anchors, in fp32."""
        features = self._with_anchors(features)
        anchors = torch.cat(self.anchors(features))
        matched_idxs, labels = match(
            anchors,
            targets.boxes,
            targets.valid,
            targets.crowd,
            self.settings.positive_iou,
            self.settings.negative_iou,
        )
        idxs, sampled_mask = sample(labels, self.settings.samples, self.settings.positive_fraction, generator)
        score, delta = self.head.forward_at(features, idxs)
        positive = sampled_mask & (labels.gather(1, idxs) == POSITIVE)
        normaliser = sampled_mask.sum().clamp(min=1)
        objectness_loss = F.binary_cross_entropy_with_logits(score, positive.float(), reduction="none")
        if targets.boxes.shape[1]:
            object_idxs = matched_idxs.gather(1, idxs)[..., None].expand(-1, -1, 4)
            target = boxes.encode(targets.boxes.gather(1, object_idxs), anchors[idxs])
            box_loss = F.smooth_l1_loss(delta, target, beta=self.settings.box_loss_beta, reduction="none").sum(-1)
        else:
            box_loss = delta.sum(-1) * 0
        # `where`, not a product: entries that are not sampled may be infinite (padding boxes have no size).
        return {
            "rpn_objectness": torch.where(sampled_mask, objectness_loss, 0).sum() / normaliser,
            "rpn_box": torch.where(positive, box_loss, 0).sum() / normaliser,
        }

    @torch.no_grad()
    def propose(
        self, objectness: list[Tensor], deltas: list[Tensor], anchors: list[Tensor], sizes: Tensor, to_train: bool
    ) -> Proposals:
        """Propose boxes: top-k of each level, clipping to `sizes` (N, 2), NMS per level, top-k over all levels.

        Args:
            objectness, deltas, anchors: as `forward` returns them.
            to_train: propose as many as a second stage is trained on, else as many as it is tested on.
        """
        s, mode = self.settings, 0 if to_train else 1
        pre = (s.pre_nms_topk_single if len(anchors) == 1 else s.pre_nms_topk)[mode]
        topk = s.post_nms_topk[mode]
        # On a GPU all boxes at once: a second try would have to wait until the host knows how many the first one kept.
        count = topk * 5 // 4 if sizes.device.type == "cpu" else pre * len(anchors)
        kept = self._best(list(zip(objectness, deltas, anchors, strict=True)), sizes, pre, topk, count)
        longest = max(len(score) for _, score in kept)
        box = torch.stack([F.pad(b, (0, 0, 0, longest - len(b))) for b, _ in kept])
        score = torch.stack([F.pad(t, (0, longest - len(t)), value=-torch.inf) for _, t in kept])
        return Proposals(box, score.sigmoid(), torch.isfinite(score))

    def _best(
        self, levels: list[tuple[Tensor, Tensor, Tensor]], sizes: Tensor, pre: int, topk: int, count: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Return each image's best `topk` boxes (K, 4) and logits (K,) after NMS of the best `pre` of each level.

        NMS of the best boxes is the beginning of NMS of all, and its time grows with the square of their number. So the best
        `count` of all levels together are tried first, then more for the images where NMS keeps too few.

        Args:
            levels: objectness (N, Ri), deltas (N, Ri, 4) and anchors (Ri, 4) of each level.
        """
        best = []
        for score, delta, anchor in levels:
            top, idxs = score.float().topk(min(pre, count, score.shape[1]), dim=1)
            box = boxes.decode(delta.gather(1, idxs[..., None].expand(-1, -1, 4)), anchor[idxs])
            best.append((boxes.clip(box, sizes), top))
        total, lengths = sum(min(pre, len(anchor)) for *_, anchor in levels), [[len(top[0]) for _, top in best]] * len(sizes)
        if count < total:
            lowest = torch.cat([top for _, top in best], 1).topk(count).values[:, -1:]
            lengths = torch.stack([(top >= lowest).sum(1) for _, top in best], 1).tolist()
        kept = [
            self._suppress([(b[i, :k], t[i, :k]) for (b, t), k in zip(best, lengths[i], strict=True)], topk)
            for i in range(len(sizes))
        ]
        incomplete = [i for i, (_, score) in enumerate(kept) if len(score) < topk]
        if incomplete and count < total:
            fewest = max(min(len(kept[i][1]) for i in incomplete), 1)
            more = count * topk // fewest + topk // 8 + 1
            their_levels = [(score[incomplete], delta[incomplete], anchor) for score, delta, anchor in levels]
            for i, best_of_more in zip(incomplete, self._best(their_levels, sizes[incomplete], pre, topk, more), strict=True):
                kept[i] = best_of_more
        return kept

    def _suppress(self, levels: list[tuple[Tensor, Tensor]], topk: int) -> tuple[Tensor, Tensor]:
        """Apply NMS to each level [(boxes (K, 4), logits (K,))] of one image; return the best `topk` of all levels together."""
        keeps = [nms(box, score, self.settings.nms_thresh) for box, score in levels]
        pairs = list(zip(levels, keeps, strict=True))
        box, score = torch.cat([b[keep] for (b, _), keep in pairs]), torch.cat([t[keep] for (_, t), keep in pairs])
        nonempty = (box[:, 2] > box[:, 0]) & (box[:, 3] > box[:, 1])  # clipping can empty a box
        box, score = box[nonempty], score[nonempty]
        score, order = score.topk(min(topk, len(score)))
        return box[order], score

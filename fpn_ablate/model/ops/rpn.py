"""RPN that computes its head at the sampled anchors only, and tries the best boxes first in NMS.

Shape letters: N images, A anchors a cell, Ri anchors of level i, S sampled anchors an image, K boxes of one image.
"""

import torch
from torch import Tensor
from torchvision.ops import nms

from fpn_ablate.model import boxes
from fpn_ablate.model.heads.rpn import RPN, LevelHeads, RPNHead
from fpn_ablate.model.ops.onednn import linear
from fpn_ablate.model.ops.sparse_conv import conv3x3_at, gather_3x3
from fpn_ablate.model.precision import autocast_off, full_precision
from fpn_ablate.structures.levels import Features


class FastRPN(RPN):
    """`RPN` that selects proposals of all images together.

    Attributes:
        one_nms: NMS of all boxes of an image in one call, for a GPU: the host waits for the result of each call.
    """

    one_nms = False

    def select(
        self, levels: list[tuple[Tensor, Tensor, Tensor]], sizes: Tensor, pre: int, topk: int
    ) -> list[tuple[Tensor, Tensor]]:
        if not self.one_nms:
            return self._select(levels, sizes, pre, topk, topk * 5 // 4)
        best = self._best(levels, sizes, pre)
        box, score = (torch.cat(column, 1) for column in zip(*best, strict=True))
        score = score.masked_fill(boxes.area(box) <= 0, -torch.inf)  # so the boxes that clipping emptied come last
        # An offset keeps levels apart; fp32 could not hold it to a fraction of a pixel.
        level = torch.cat([torch.full_like(top[0], number, dtype=torch.float64) for number, (_, top) in enumerate(best)])
        apart = box + (level * (box.amax() + 1))[:, None]
        keeps = [nms(apart[n], score[n].double(), self.config.nms_thresh)[:topk] for n in range(len(sizes))]
        kept = [(box[n, keep], score[n, keep]) for n, keep in enumerate(keeps)]
        solid = torch.stack([torch.isfinite(logits).sum() for _, logits in kept]).tolist()
        return [(image_boxes[:k], logits[:k]) for (image_boxes, logits), k in zip(kept, solid, strict=True)]

    def _best(self, levels: list[tuple[Tensor, Tensor, Tensor]], sizes: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
        """Return the clipped boxes (N, K, 4) and logits (N, K) of the `count` best anchors of each level."""
        best = []
        for score, delta, anchor in levels:
            top, idxs = score.topk(min(count, score.shape[1]), dim=1)
            box = boxes.decode(delta.gather(1, idxs[..., None].expand(-1, -1, 4)), anchor[idxs])
            best.append((boxes.clip(box, sizes), top))
        return best

    def _select(
        self, levels: list[tuple[Tensor, Tensor, Tensor]], sizes: Tensor, pre: int, topk: int, count: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Select as `RPN.select`.

        NMS of the best boxes is the beginning of NMS of all, and its time grows with the square of their number. So the best
        `count` of all levels together are tried first, then more for the images where NMS keeps too few.
        """
        best = self._best(levels, sizes, min(pre, count))
        total, lengths = sum(min(pre, len(anchor)) for *_, anchor in levels), [[len(top[0]) for _, top in best]] * len(sizes)
        if count < total:
            lowest = torch.cat([top for _, top in best], 1).topk(count).values[:, -1:]
            lengths = torch.stack([(top >= lowest).sum(1) for _, top in best], 1).tolist()
        kept = [
            self.suppress([(b[i, :k], t[i, :k]) for (b, t), k in zip(best, lengths[i], strict=True)], topk)
            for i in range(len(sizes))
        ]
        incomplete = [i for i, (_, score) in enumerate(kept) if len(score) < topk]
        if incomplete and count < total:
            fewest = max(min(len(kept[i][1]) for i in incomplete), 1)
            more = count * topk // fewest + topk // 8 + 1
            their_levels = [(score[incomplete], delta[incomplete], anchor) for score, delta, anchor in levels]
            for i, best_of_more in zip(incomplete, self._select(their_levels, sizes[incomplete], pre, topk, more), strict=True):
                kept[i] = best_of_more
        return kept


class SparseRPN(FastRPN):
    """`RPN` whose `RPNHead`, or one for each level, is computed at the sampled anchors alone.

    The losses read 256 of an image's many thousand anchors, and nothing else of the head's output has a gradient.
    """

    @property
    def max_sampled_cells(self) -> int:
        """Return how many cells of an image the losses read at most: the 3x3 around each sampled anchor."""
        return 9 * self.config.samples

    def predict_at(self, features: Features, idxs: Tensor) -> tuple[Tensor, Tensor]:
        if not isinstance(self.head, LevelHeads):
            return _head_at(self.head, list(features.values()), idxs)
        scores, deltas, first = [], [], 0
        for name, x in features.items():
            # Each head is computed at all samples, those of other levels moved to an end of its own: their number would have
            # to be waited for on a GPU, and a sample costs little.
            head = self.head.levels[name]
            count = x.shape[-2] * x.shape[-1] * head.num_anchors
            its_score, its_delta = _head_at(head, [x], (idxs - first).clamp(0, count - 1))
            inside = (idxs >= first) & (idxs < first + count)
            scores.append(torch.where(inside, its_score, 0))
            deltas.append(torch.where(inside[..., None], its_delta, 0))
            first += count
        return sum(scores), sum(deltas)


def _head_at(head: RPNHead, maps: list[Tensor], idxs: Tensor) -> tuple[Tensor, Tensor]:
    """Return objectness (N, S) and deltas (N, S, 4) of a head at the anchors `idxs` (N, S) of the maps that it reads."""
    num_anchors = head.num_anchors
    cell, anchor = idxs // num_anchors, (idxs % num_anchors).flatten()
    hidden = head.act(conv3x3_at(gather_3x3(maps, cell), head.conv))
    with autocast_off():
        hidden = full_precision(hidden)
        scores = linear(hidden, head.objectness.weight.flatten(1), head.objectness.bias)
        objectness = head.logit(scores.unflatten(1, (num_anchors, head.scores)))
        deltas = linear(hidden, head.deltas.weight.flatten(1), head.deltas.bias).view(-1, num_anchors, 4)
    row = torch.arange(len(anchor), device=anchor.device)
    return objectness[row, anchor].view_as(idxs), deltas[row, anchor].view(*idxs.shape, 4)

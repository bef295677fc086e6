"""Region proposal network over any set of levels (Sec. 4.1).

Shape letters: N images, L levels, A anchors a cell, Hi x Wi cells of level i, Ri = Hi * Wi * A, R = sum of Ri anchors an image,
G ground-truth boxes, S sampled anchors an image, P proposals, K boxes of one image that are being selected.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import nms

from fpn_ablate.config.parts import RPNConfig
from fpn_ablate.model import anchors as anchor_grid
from fpn_ablate.model import boxes
from fpn_ablate.model.matching import POSITIVE, match, sample
from fpn_ablate.model.precision import autocast_off, full_precision
from fpn_ablate.structures.instances import Proposals, Targets
from fpn_ablate.structures.levels import Features, Level, common_width


class RPNHead(nn.Module):
    """3x3 convolution with ReLU, then sibling 1x1 convolutions for objectness and box deltas; all levels share one head.

    A head of another kind has a width and the number of anchors a cell as its constructor's arguments, and the same output.

    Args:
        relu: behind the 3x3.
        scores: of an anchor; 2: background and object, as in Faster R-CNN, whose softmax is the sigmoid of their difference.
    """

    def __init__(self, channels: int, num_anchors: int, relu: bool = True, scores: int = 1) -> None:
        super().__init__()
        self.num_anchors, self.relu, self.scores = num_anchors, relu, scores
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.objectness = nn.Conv2d(channels, scores * num_anchors, 1)
        self.deltas = nn.Conv2d(channels, 4 * num_anchors, 1)

    def forward(self, features: Features) -> tuple[list[Tensor], list[Tensor]]:
        """Return, for each level, objectness (N, Ri) and deltas (N, Ri, 4), in the order of the anchors."""
        hidden = [self.act(self.conv(x)) for x in features.values()]
        with autocast_off():  # bf16 has so few values that hundreds of the best scores would tie
            hidden = [full_precision(x) for x in hidden]
            objectness = [self.logit(anchor_grid.flatten_cells(self.objectness(x), self.scores)) for x in hidden]
            return objectness, [anchor_grid.flatten_cells(self.deltas(x), 4) for x in hidden]

    def act(self, hidden: Tensor) -> Tensor:
        return F.relu(hidden) if self.relu else hidden

    def logit(self, scores: Tensor) -> Tensor:
        """Return the logit (...) of an object from the scores (..., 1) or (..., 2) of an anchor."""
        return scores[..., -1] if self.scores == 1 else scores[..., 1] - scores[..., 0]

    def init_parameter(self, layer: nn.Module, parameter: Tensor, generator: torch.Generator) -> bool:
        """Draw Gaussian weights of 0.01 (Detectron)."""
        if is_weight := parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.01, generator=generator)
        return is_weight


class LevelHeads(nn.Module):
    """A head of its own for each level (`rpn.shared=false`), in place of one that all share."""

    def __init__(self, heads: dict[str, nn.Module]) -> None:
        super().__init__()
        self.levels = nn.ModuleDict(heads)

    def forward(self, features: Features) -> tuple[list[Tensor], list[Tensor]]:
        """Return what a shared head does, for levels of any widths."""
        outputs = [self.levels[name]({name: x}) for name, x in features.items()]
        return [score for scores, _ in outputs for score in scores], [delta for _, deltas in outputs for delta in deltas]


class RPN(nn.Module):
    """Anchors, head, losses and proposals. A pyramid's coarsest levels are not used where there are fewer anchor sizes.

    Args:
        levels: of the neck.
        short_side: of the input in pixels; the configured sizes are those of a short side of 800.
        head: constructs a head from a width and the number of anchors a cell.

    Raises:
        UserError: the levels share a head, and their widths differ.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        config: RPNConfig,
        short_side: int = anchor_grid.PAPER_SHORT_SIDE,
        head: Callable[[int, int], nn.Module] = RPNHead,
    ) -> None:
        super().__init__()
        self.levels, self.config = tuple(levels), config
        sizes = [anchor_grid.scaled(size, short_side) for size in config.anchor_sizes]
        self.level_sizes = anchor_grid.sizes_per_level(levels, sizes, config.shared)
        per_cell = [len(of_level) * len(config.anchor_ratios) for of_level in self.level_sizes]
        if config.shared:
            self.head = head(common_width(levels, "rpn.shared=true"), per_cell[0])
        else:
            pairs = zip(levels, per_cell, strict=False)
            self.head = LevelHeads({level.name: head(level.channels, count) for level, count in pairs})
        like_torchvision = config.anchor_grid == "torchvision"
        self.anchors = anchor_grid.AnchorGrids(self.levels, self.level_sizes, config.anchor_ratios, like_torchvision)

    def forward(self, features: Features) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return, for each level, objectness (N, Ri), deltas (N, Ri, 4) and anchors (Ri, 4)."""
        features = self._with_anchors(features)
        return *self.head(features), self.anchors(features)

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
            self.config.positive_iou,
            self.config.negative_iou,
        )
        idxs, sampled_mask = sample(labels, self.config.samples, self.config.positive_fraction, generator)
        score, delta = self.predict_at(features, idxs)
        positive = sampled_mask & (labels.gather(1, idxs) == POSITIVE)
        normaliser = sampled_mask.sum().clamp(min=1)
        objectness_loss = F.binary_cross_entropy_with_logits(score, positive.float(), reduction="none")
        if targets.boxes.shape[1]:
            object_idxs = matched_idxs.gather(1, idxs)[..., None].expand(-1, -1, 4)
            target = boxes.encode(targets.boxes.gather(1, object_idxs), anchors[idxs])
            box_loss = F.smooth_l1_loss(delta, target, beta=self.config.box_loss_beta, reduction="none").sum(-1)
        else:
            box_loss = delta.sum(-1) * 0
        # `where`, not a product: entries that are not sampled may be infinite (padding boxes have no size).
        return {
            "rpn_objectness": torch.where(sampled_mask, objectness_loss, 0).sum() / normaliser,
            "rpn_box": torch.where(positive, box_loss, 0).sum() / normaliser,
        }

    def predict_at(self, features: Features, idxs: Tensor) -> tuple[Tensor, Tensor]:
        """Return objectness (N, S) and deltas (N, S, 4) of the anchors `idxs` (N, S)."""
        objectness, deltas = self.head(features)
        delta_idxs = idxs[..., None].expand(-1, -1, 4)
        return torch.cat(objectness, 1).gather(1, idxs), torch.cat(deltas, 1).gather(1, delta_idxs)

    @torch.no_grad()
    def propose(
        self,
        objectness: list[Tensor],
        deltas: list[Tensor],
        anchors: list[Tensor],
        sizes: Tensor,
        to_train: bool,
        topk: int | None = None,
    ) -> Proposals:
        """Propose boxes: top-k of each level, clipping to `sizes` (N, 2), NMS per level, top-k over all levels.

        Args:
            objectness, deltas, anchors: as `forward` returns them.
            to_train: propose as many as a second stage is trained on, else as many as it is tested on.
            topk: how many that is, in place of `post_nms_topk`.
        """
        config, mode = self.config, 0 if to_train else 1
        pre = (config.pre_nms_topk_single if len(anchors) == 1 else config.pre_nms_topk)[mode]
        levels = list(zip((full_precision(score) for score in objectness), deltas, anchors, strict=True))
        best = self.select(levels, sizes, pre, topk or config.post_nms_topk[mode])
        longest = max(len(score) for _, score in best)
        box = torch.stack([F.pad(b, (0, 0, 0, longest - len(b))) for b, _ in best])
        score = torch.stack([F.pad(s, (0, longest - len(s)), value=-torch.inf) for _, s in best])
        return Proposals(box, score.sigmoid(), torch.isfinite(score))

    def select(
        self, levels: list[tuple[Tensor, Tensor, Tensor]], sizes: Tensor, pre: int, topk: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Return each image's best `topk` boxes (K, 4) and logits (K,) after NMS of the best `pre` of each level.

        Args:
            levels: objectness (N, Ri), deltas (N, Ri, 4) and anchors (Ri, 4) of each level.
        """
        best = []
        for n in range(len(sizes)):
            candidates = []
            for objectness, deltas, anchors in levels:
                score, idxs = objectness[n].topk(min(pre, len(anchors)))
                box = boxes.decode(deltas[n, idxs], anchors[idxs])
                candidates.append((boxes.clip(box[None], sizes[n : n + 1])[0], score))
            best.append(self.suppress(candidates, topk))
        return best

    def suppress(self, levels: list[tuple[Tensor, Tensor]], topk: int) -> tuple[Tensor, Tensor]:
        """Apply NMS to each level [(boxes (K, 4), logits (K,))] of one image; return the best `topk` of all levels together."""
        keeps = [nms(box, score, self.config.nms_thresh) for box, score in levels]
        pairs = list(zip(levels, keeps, strict=True))
        box, score = torch.cat([b[keep] for (b, _), keep in pairs]), torch.cat([s[keep] for (_, s), keep in pairs])
        nonempty = (box[:, 2] > box[:, 0]) & (box[:, 3] > box[:, 1])  # clipping can empty a box
        box, score = box[nonempty], score[nonempty]
        score, order = score.topk(min(topk, len(score)))
        return box[order], score

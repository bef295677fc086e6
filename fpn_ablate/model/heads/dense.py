"""Dense head over any set of levels: detections of every class at every place of every level, in one stage.

Shape letters: N images, L levels, Ri boxes of level i, T best boxes of a level, K classes. Labels are 1..K.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fpn_ablate.config.dense import DenseTask
from fpn_ablate.model import boxes
from fpn_ablate.model.anchors import PAPER_SHORT_SIDE
from fpn_ablate.model.layers import group_norm
from fpn_ablate.model.nms import best_detections
from fpn_ablate.structures.instances import BatchDetections, Proposals, Targets
from fpn_ablate.structures.levels import Features, Level


def prior_bias(prior: float) -> float:
    """Return the bias by which a sigmoid score is `prior` at the start (RetinaNet, Sec. 4.1)."""
    return -math.log((1 - prior) / prior)


class Subnet(nn.Sequential):
    """3x3 convolutions of one width, each with ReLU and perhaps group norm before it; all levels share them.

    Args:
        bias: convolutions in front of a norm have biases too (FCOS).
    """

    def __init__(self, channels: int, convolutions: int, norm: str, bias: bool = False) -> None:
        super().__init__()
        for _ in range(convolutions):
            conv = nn.Conv2d(channels, channels, 3, padding=1, bias=bias or norm == "none")
            norms = [group_norm(channels)] if norm == "gn" else []
            self.append(nn.Sequential(conv, *norms, nn.ReLU(inplace=True)))


class DenseHead(nn.Module):
    """Base of dense heads: a head defines `forward`, `losses` and `predict`; what becomes of its boxes is here.

    Args:
        levels: of the neck, finest first.
        num_classes: K.
        short_side: of the input in pixels; configured sizes are those of a short side of 800.

    Attributes:
        label: name of the head in tables.
    """

    label: str

    def __init__(
        self, levels: Sequence[Level], config: DenseTask, num_classes: int, short_side: int = PAPER_SHORT_SIDE
    ) -> None:
        super().__init__()
        self.levels, self.config, self.num_classes, self.short_side = tuple(levels), config, num_classes, short_side

    def forward(self, features: Features) -> tuple[list[Tensor], ...]:
        """Return the head's raw output: lists of one tensor (N, Ri, ...) a level, the first of which says how many Ri are."""
        raise NotImplementedError

    def losses(self, features: Features, targets: Targets, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the named losses of a batch, in fp32."""
        raise NotImplementedError

    def predict(self, features: Features) -> list[tuple[Tensor, Tensor]]:
        """Return, for each level, scores (N, Ri, K) in 0..1 and boxes (N, Ri, 4), not clipped, in fp32."""
        raise NotImplementedError

    def init_parameter(self, layer: nn.Module, parameter: Tensor, generator: torch.Generator) -> bool:
        """Draw Gaussian weights of 0.01 (RetinaNet)."""
        if is_weight := parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.01, generator=generator)
        return is_weight

    @torch.no_grad()
    def detect(self, features: Features, sizes: Tensor) -> BatchDetections:
        """Detect in images of `sizes` (N, 2): the best scores of each level, NMS by class over all levels."""
        config = self.config
        box, score, label = self._best(self.predict(features), sizes)
        valid = (score > config.score_thresh) & (boxes.area(box) > 0)
        image, place = valid.nonzero(as_tuple=True)
        kept = box[image, place], score[image, place], image, label[image, place]
        return best_detections(*kept, len(sizes), config.nms_thresh, config.detections)

    @torch.no_grad()
    def propose(self, features: Features, sizes: Tensor) -> Proposals:
        """Propose in images of `sizes` (N, 2): each box by its best class score, NMS over all classes and levels."""
        config = self.config
        levels = [(score.amax(-1, keepdim=True), box) for score, box in self.predict(features)]
        box, score, label = self._best(levels, sizes)
        image, place = (boxes.area(box) > 0).nonzero(as_tuple=True)
        kept = box[image, place], score[image, place], image, label[image, place]
        best = best_detections(*kept, len(sizes), config.proposal_nms_thresh, config.proposals)
        return Proposals(best.boxes, best.scores, best.valid)

    def _best(self, levels: Sequence[tuple[Tensor, Tensor]], sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return boxes (N, L * T, 4), clipped to `sizes`, scores and labels (N, L * T) of the best scores of each level.

        A box counts once for each class.
        """
        best = []
        for score, box in levels:
            num_classes = score.shape[-1]
            top, idxs = score.flatten(1).topk(min(self.config.pre_nms_topk, score.shape[1] * num_classes))
            row = (idxs // num_classes)[..., None].expand(-1, -1, 4)
            best.append((boxes.clip(box.gather(1, row), sizes), top, idxs % num_classes + 1))
        box, score, label = (torch.cat(column, 1) for column in zip(*best, strict=True))
        return box, score, label

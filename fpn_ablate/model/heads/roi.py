"""Second stage: Fast R-CNN's head over any set of levels (Sec. 4.2), with or without a mask branch (Mask R-CNN).

Shape letters: N images, P proposals, G ground-truth boxes, S sampled RoIs an image, M = N * S RoIs, K classes, D detections,
C channels, R x R pixels of a mask. Labels are 1..K; 0 is background.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpn_ablate.config.parts import RoI
from fpn_ablate.model import boxes
from fpn_ablate.model.heads.box_head import BoxHead, Predictor
from fpn_ablate.model.heads.mask import MaskBranch
from fpn_ablate.model.heads.roi_pooler import RoIPooler
from fpn_ablate.model.matching import IGNORED, POSITIVE, match, sample
from fpn_ablate.model.nms import best_detections
from fpn_ablate.structures.instances import BatchDetections, Proposals, Targets
from fpn_ablate.structures.levels import Features


class RoIHeads(nn.Module):
    """Pooling, box head, predictor and perhaps a mask branch, with their losses and their detections."""

    def __init__(
        self, pooler: RoIPooler, box_head: BoxHead, num_classes: int, config: RoI, mask: MaskBranch | None = None
    ) -> None:
        super().__init__()
        self.pooler, self.box_head, self.config = pooler, box_head, config
        self.predictor = Predictor(box_head.out_channels, num_classes)
        self.mask = mask
        self.register_buffer("_box_weights", torch.tensor(config.box_weights), persistent=False)

    def forward(self, features: Features, rois: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores (N, S, K + 1) and deltas (N, S, K, 4) of RoIs (N, S, 4)."""
        scores, deltas, _ = self._forward(features, rois)
        return scores, deltas

    def _forward(self, features: Features, rois: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what `forward` does, and the maps (M, ...) that a mask branch can share."""
        maps = self.box_head.mask_features(self.pooler(features, rois))
        scores, deltas = self.predictor(self.box_head.from_mask_features(maps))
        return scores.unflatten(0, rois.shape[:2]), deltas.unflatten(0, rois.shape[:2]), maps

    def losses(
        self, features: Features, proposals: Proposals, targets: Targets, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Return `roi_class` (cross-entropy) and `roi_box` (smooth L1 of the positives), both over the sampled RoIs, and with a
        mask branch `mask`, of the same positives."""
        rois, labels, matched_idxs, sampled_mask = self.sample(proposals, targets, generator)
        scores, deltas, maps = self._forward(features, rois)
        losses = self.losses_of(scores, deltas, rois, labels, matched_idxs, sampled_mask, targets.boxes)
        if self.mask:
            assert targets.masks is not None, "a mask branch needs the objects' masks"
            image, place = (sampled_mask & (labels > 0)).nonzero(as_tuple=True)
            box, label, objects = (x[image, place] for x in (rois, labels, matched_idxs))
            if self.mask.pooler:
                maps = self._mask_features(features, image, box)
            else:  # computed for the box head
                maps = maps.unflatten(0, rois.shape[:2])[image, place]
            losses |= self.mask.losses(maps, label, targets.masks, image, objects, box)
        return losses

    @torch.no_grad()
    def sample(
        self, proposals: Proposals, targets: Targets, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sample RoIs from the best proposals and the objects themselves.

        Returns:
            rois (N, S, 4), labels (N, S) in 0..K, matched_idxs (N, S) into the objects, sampled_mask (N, S) bool: False where
            an image has fewer RoIs to sample than S.
        """
        config = self.config
        topk = config.proposals[0]
        candidates = torch.cat([proposals.boxes[:, :topk], targets.boxes], 1)
        valid = torch.cat([proposals.valid[:, :topk], targets.valid], 1)
        matched_idxs, matches = match(
            candidates,
            targets.boxes,
            targets.valid,
            targets.crowd,
            positive_iou=config.positive_iou,
            negative_iou=config.positive_iou,
            allow_low_quality_matches=False,
        )
        matches.masked_fill_(~valid, IGNORED)
        idxs, sampled_mask = sample(matches, config.samples, config.positive_fraction, generator)
        matched_idxs = matched_idxs.gather(1, idxs)
        positive = matches.gather(1, idxs) == POSITIVE
        labels = torch.zeros_like(matched_idxs)
        if targets.boxes.shape[1]:
            labels = torch.where(positive, targets.labels.gather(1, matched_idxs), 0)
        return candidates.gather(1, idxs[..., None].expand(-1, -1, 4)), labels, matched_idxs, sampled_mask

    def losses_of(
        self,
        scores: Tensor,
        deltas: Tensor,
        rois: Tensor,
        labels: Tensor,
        matched_idxs: Tensor,
        sampled_mask: Tensor,
        gt_boxes: Tensor,
    ) -> dict[str, Tensor]:
        """Return the losses of samples drawn before; shapes as `forward` and `sample` return them."""
        normaliser = sampled_mask.sum().clamp(min=1)
        class_loss = F.cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
        positive = sampled_mask & (labels > 0)
        box_loss = deltas.sum((2, 3)) * 0  # a gradient of 0, as from a batch whose objects are all padding
        if gt_boxes.shape[1]:
            class_idxs = (labels - 1).clamp(min=0)[..., None, None].expand(-1, -1, 1, 4)
            target = boxes.encode(gt_boxes.gather(1, matched_idxs[..., None].expand(-1, -1, 4)), rois)
            # A padding RoI has no size and no target: a NaN here would be a NaN in the gradients.
            target = torch.where(positive[..., None], target * self._box_weights, 0)
            delta, beta = deltas.gather(2, class_idxs)[:, :, 0], self.config.box_loss_beta
            box_loss = F.smooth_l1_loss(delta, target, beta=beta, reduction="none").sum(-1)
        return {
            "roi_class": torch.where(sampled_mask, class_loss, 0).sum() / normaliser,
            "roi_box": torch.where(positive, box_loss, 0).sum() / normaliser,
        }

    @torch.no_grad()
    def detect(self, features: Features, proposals: Proposals, sizes: Tensor) -> BatchDetections:
        """Detect in images of `sizes` (N, 2): every class of every RoI above the score threshold, NMS per class."""
        rois, valid = self.candidates(proposals)
        detections = self.detections(*self(features, rois), rois, valid, sizes)
        return replace(detections, masks=self._masks(features, detections)) if self.mask else detections

    def candidates(self, proposals: Proposals) -> tuple[Tensor, Tensor]:
        """Return the RoIs (N, P, 4) that are tested, and which of them are valid (N, P)."""
        topk = self.config.proposals[1]
        return proposals.boxes[:, :topk], proposals.valid[:, :topk]

    def detections(self, scores: Tensor, deltas: Tensor, rois: Tensor, valid: Tensor, sizes: Tensor) -> BatchDetections:
        """Return the detections of `detect` without masks, from what `forward` returns of RoIs (N, P, 4) and valid (N, P)."""
        scores = scores.softmax(-1)[..., 1:]
        box = boxes.decode(deltas / self._box_weights, rois[:, :, None])
        box = boxes.clip(box.flatten(1, 2), sizes).view_as(box)
        return self._suppress(box, scores, valid)

    def _masks(self, features: Features, detections: BatchDetections) -> Tensor:
        """Return the probabilities (N, D, R, R) of the masks of detected boxes, each of its box's class; 0 for padding."""
        image, rank = detections.valid.nonzero(as_tuple=True)
        maps = self._mask_features(features, image, detections.boxes[image, rank])
        logits = self.mask(maps, detections.labels[image, rank])
        masks = logits.new_zeros(*detections.valid.shape, *logits.shape[1:])
        masks[image, rank] = logits.sigmoid()
        return masks

    def _mask_features(self, features: Features, image: Tensor, box: Tensor) -> Tensor:
        """Return the maps that the mask branch reads of boxes (M, 4), each in its `image` (M,)."""
        pooler = self.mask.pooler or self.pooler
        pooled = pooler.pool(features, image, box)
        return pooled if self.mask.pooler else self.box_head.mask_features(pooled)

    def _suppress(self, box: Tensor, scores: Tensor, valid: Tensor) -> BatchDetections:
        """Apply score threshold and NMS to boxes (N, P, K, 4) with scores (N, P, K) and valid (N, P); best first."""
        config = self.config
        detected = (scores > config.score_thresh) & valid[..., None] & (boxes.area(box) > 0)
        image, roi, label = detected.nonzero(as_tuple=True)
        box, score = box[image, roi, label], scores[image, roi, label]
        return best_detections(box, score, image, label + 1, len(scores), config.nms_thresh, config.detections)

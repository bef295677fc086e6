"""Featurised image pyramid (Figure 1 (a)): one detector reads each image at several scales.

Shape letters: N images of H x W pixels, P proposals, M = N * P boxes, K classes, Ri anchors of level i.
Pixels are those of the detector's input; those of a resized image are called scaled.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fpn_ablate.config.parts import ImagePyramidConfig
from fpn_ablate.model import anchors as anchor_grid
from fpn_ablate.model import boxes
from fpn_ablate.model.backbones.base import Backbone
from fpn_ablate.model.detectors.two_stage import Detector, Generators
from fpn_ablate.model.heads.roi import RoIHeads
from fpn_ablate.model.heads.rpn import RPN
from fpn_ablate.model.necks.base import Neck
from fpn_ablate.structures.images import resize
from fpn_ablate.structures.instances import BatchDetections, Proposals, Targets
from fpn_ablate.structures.levels import Features

# The levels of a resized image, and the factors (4,) by which boxes of the input grow to it.
Scaled = tuple[Features, Tensor]


def nearest_scales(areas: Tensor, scales: Sequence[float], box_size: float, count: int = 1) -> Tensor:
    """Return the indices (..., count) of the scales at which boxes of `areas` (...) come nearest to box_size^2 square pixels.

    Areas are compared, as in SPPnet and Fast R-CNN. A box grows with the scale, so the two nearest scales are neighbours.
    """
    distance = (areas[..., None] * areas.new_tensor(scales) ** 2 - box_size**2).abs()
    return distance.argsort(dim=-1, stable=True)[..., :count]


def anchor_sizes_read(sizes: Sequence[float], scales: Sequence[float], box_size: float) -> list[set[float]]:
    """Return, for each scale, the RPN's anchor sizes that are read there, in scaled pixels.

    An anchor is a box: that of each size in pixels belongs to the scale where it comes nearest to `box_size`, and there the
    anchors of its scaled size are read, or of the nearest that the RPN has. So a pyramid has the anchors of the detector that
    reads one image, one size a scale if there are as many scales as sizes. The papers state such a rule for RoIs alone.
    """
    read: list[set[float]] = [set() for _ in scales]
    areas = torch.tensor([float(size) ** 2 for size in sizes], device="cpu")
    for size, number in zip(sizes, nearest_scales(areas, scales, box_size).flatten().tolist(), strict=True):
        ratios = {other: other / (size * scales[number]) for other in sizes}
        read[number].add(min(sizes, key=lambda other: max(ratios[other], 1 / ratios[other])))
    return read


class ImagePyramid(Detector):
    """A two-stage detector that is tested on an image pyramid.

    The RPN reads at each scale the anchors that belong to it (`anchor_sizes_read`). Its best ones of each scale go through NMS
    of their own, and the best of all scales together are the proposals, as with the levels of a feature pyramid. The second
    stage pools each RoI at the scale where it comes nearest to `box_size` ("nearest": SPPnet, Fast R-CNN), or at the two
    nearest, with the element-wise maximum of what the box head makes of them ("adjacent_max": Faster R-CNN+++).

    It is trained on the input as it is, or with `config.train` "random" on all objects and with all anchors, at one scale that
    is drawn for each batch (Fast R-CNN). Larger images are enlarged from the input, not read anew.

    Args:
        short_side: of the input in pixels; `config.box_size` is that of a short side of 800.
        antialias: as `structures.images.resize`.
    """

    def __init__(
        self,
        backbone: Backbone,
        neck: Neck,
        rpn: RPN | None,
        roi: RoIHeads | None,
        config: ImagePyramidConfig,
        short_side: int = anchor_grid.PAPER_SHORT_SIDE,
        antialias: bool = True,
    ) -> None:
        super().__init__(backbone, neck, rpn, roi)
        self.config, self.antialias = config, antialias
        self.box_size = anchor_grid.scaled(config.box_size, short_side)
        sizes = sorted({size for of_level in rpn.level_sizes for size in of_level}) if rpn else []
        self.sizes_read = anchor_sizes_read(sizes, config.scales, self.box_size)

    def losses(
        self, images: Tensor, targets: Targets, generators: Generators, proposals: Proposals | None = None
    ) -> dict[str, Tensor]:
        """Return the losses of `Detector.losses`; with `config.train` "random" the generator "scale" draws the scale."""
        if self.config.train == "random":
            generator, scales = generators("scale"), self.config.scales
            scale = scales[int(torch.randint(len(scales), (), generator=generator, device=generator.device))]
            images, sizes, ratio = self.resize(images, targets.sizes, scale)
            targets = replace(targets, boxes=targets.boxes * ratio, sizes=sizes)
            proposals = proposals and replace(proposals, boxes=proposals.boxes * ratio)
        return super().losses(images, targets, generators, proposals)

    @torch.no_grad()
    def propose(self, images: Tensor, sizes: Tensor, to_train: bool = False) -> Proposals:
        """Return proposals of all scales in pixels of `images`, as many as `Detector.propose`."""
        return self.rpn.propose(*self._read_rpn_at_scales(self._features_at_scales(images, sizes)), sizes, to_train)

    @torch.no_grad()
    def detect(self, images: Tensor, sizes: Tensor, proposals: Proposals | None = None) -> BatchDetections:
        """Return detections in pixels of `images`, from `proposals` or from the RPN's own."""
        pyramid = self._features_at_scales(images, sizes)
        if proposals is None:
            topk = self.roi.config.proposals[1]
            proposals = self.rpn.propose(*self._read_rpn_at_scales(pyramid), sizes, to_train=False, topk=topk)
        rois, valid = self.roi.candidates(proposals)
        return self.roi.detections(*self._classify(pyramid, rois), rois, valid, sizes)

    @property
    def scales_per_roi(self) -> int:
        """Return the number of scales that each RoI is pooled from."""
        return 1 if self.config.roi == "nearest" else min(2, len(self.config.scales))

    def scaled_sizes(self, size: Sequence[int]) -> list[tuple[int, int]]:
        """Return (height, width) at each scale of a padded batch of `size`."""
        return [_scaled_size(size, scale) for scale in self.config.scales]

    def resize(self, images: Tensor, sizes: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """Resize a padded batch (N, 3, H, W) of `sizes` (N, 2).

        Returns:
            the images, their sizes (N, 2), which may be fractions of a pixel, and the factors (4,) by which boxes grow.
        """
        before, size = tuple(images.shape[-2:]), _scaled_size(images.shape[-2:], scale)
        y, x = (new / old for new, old in zip(size, before, strict=True))
        ratio = torch.tensor([x, y, x, y], device=images.device)
        if size == before:
            return images, sizes, ratio
        return resize(_extend_edges(images, sizes), size, self.antialias), sizes * ratio[:2].flip(0), ratio

    def read_rpn(self, number: int, features: Features) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return what the RPN makes of the levels at scale `number`, without the anchors that are not read there.

        Returns:
            objectness (N, Ri), deltas (N, Ri, 4) and anchors (Ri, 4), in scaled pixels, of each level with anchors.
        """
        levels = list(self._anchors_read(number, features))
        objectness, deltas, anchors = zip(*levels, strict=True) if levels else ((), (), ())
        return list(objectness), list(deltas), list(anchors)

    def _anchors_read(self, number: int, features: Features) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        ratios = len(self.rpn.config.anchor_ratios)
        for sizes, *outputs in zip(self.rpn.level_sizes, *self.rpn(features), strict=True):
            per_cell = len(sizes) * ratios
            read = [n for n in range(per_cell) if sizes[n // ratios] in self.sizes_read[number]]  # sizes vary slowest
            if len(read) == per_cell:
                yield tuple(outputs)
            elif read:
                objectness, deltas, anchors = outputs
                yield (
                    objectness.unflatten(1, (-1, per_cell))[:, :, read].flatten(1),
                    deltas.unflatten(1, (-1, per_cell))[:, :, read].flatten(1, 2),
                    anchors.unflatten(0, (-1, per_cell))[:, read].flatten(0, 1),
                )

    def _features_at_scales(self, images: Tensor, sizes: Tensor) -> list[Scaled]:
        """Return the levels of the images at each scale; one scale is worked on after the other."""
        pyramid = []
        for scale in self.config.scales:
            scaled, scaled_sizes, ratio = self.resize(images, sizes, scale)
            pyramid.append((self.features(scaled, scaled_sizes), ratio))
        return pyramid

    def _read_rpn_at_scales(self, pyramid: Sequence[Scaled]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return what `read_rpn` does of all scales together, anchors in pixels."""
        levels: tuple[list, list, list] = ([], [], [])
        for number, (features, ratio) in enumerate(pyramid):
            objectness, deltas, anchors = self.read_rpn(number, features)
            # Deltas are shares of an anchor's sides: from an anchor in pixels they lead to a box in pixels.
            for column, of_scale in zip(levels, (objectness, deltas, [x / ratio for x in anchors]), strict=True):
                column += of_scale
        return levels

    def _classify(self, pyramid: Sequence[Scaled], rois: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores (N, P, K + 1) and deltas (N, P, K, 4) of RoIs (N, P, 4), each from its scale or two."""
        roi, (n, p) = self.roi, rois.shape[:2]
        image, box = torch.arange(n, device=rois.device).repeat_interleave(p), rois.flatten(0, 1)
        nearest = nearest_scales(boxes.area(box), self.config.scales, self.box_size, self.scales_per_roi)
        hidden = box.new_full((len(box), roi.box_head.out_channels), -torch.inf)
        for number, (features, ratio) in enumerate(pyramid):
            idxs = (nearest == number).any(1).nonzero()[:, 0]
            if len(idxs):
                pooled = roi.pooler.pool(features, image[idxs], box[idxs] * ratio)
                hidden[idxs] = torch.maximum(hidden[idxs], roi.box_head(pooled).to(hidden.dtype))
        scores, deltas = roi.predictor(hidden)
        return scores.unflatten(0, (n, p)), deltas.unflatten(0, (n, p))


def _scaled_size(size: Sequence[int], scale: float) -> tuple[int, int]:
    height, width = (max(1, round(side * scale)) for side in size)
    return height, width


def _extend_edges(images: Tensor, sizes: Tensor) -> Tensor:
    """Repeat the last row and column of images (N, 3, H, W) of `sizes` (N, 2) in their padding, which resizing would mix in."""
    channels, height, width = images.shape[1:]
    y, x = (
        torch.minimum(torch.arange(side, device=images.device), sizes[:, axis : axis + 1] - 1)
        for axis, side in enumerate((height, width))
    )
    rows = images.gather(2, y[:, None, :, None].expand(-1, channels, -1, width))
    return rows.gather(3, x[:, None, None, :].expand(-1, channels, height, -1))

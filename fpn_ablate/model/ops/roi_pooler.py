"""RoI pooling by `roi_align` of this package, on a CPU."""

from torch import Tensor

from fpn_ablate.model.heads.roi_pooler import RoIPooler
from fpn_ablate.model.ops.roi_align import roi_align
from fpn_ablate.model.precision import full_precision
from fpn_ablate.structures.levels import Features


class FastRoIPooler(RoIPooler):
    """`RoIPooler` that pools from all levels at once, where the number of points a bin is fixed."""

    def pool(self, features: Features, image: Tensor, level_idxs: Tensor, boxes: Tensor) -> Tensor:
        if self.pooling == "pool" or not self.sampling_ratio:
            return super().pool(features, image, level_idxs, boxes)
        maps, strides = zip(*((full_precision(features[level.name]), level.stride) for level in self.levels), strict=True)
        boxes, aligned = boxes.to(maps[0].dtype), self.pooling == "align_v2"
        return roi_align(maps, strides, image, level_idxs, boxes, self.resolution, self.sampling_ratio, aligned)

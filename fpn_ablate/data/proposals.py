"""Attach fixed proposals to the samples of a data set, for Fast R-CNN (Table 2) and training in steps (Tables 3 and 5).

M proposals in all, P of one image.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from fpn_ablate.structures.batch import DetectionDataset, Sample
from fpn_ablate.utils.errors import UserError


class WithProposals(DetectionDataset):
    """A data set whose samples carry proposals, P = 0 for an image that has none; otherwise equal to `dataset`.

    Args:
        image_ids: (M,) integers, in any order.
        boxes: (M, 4) XYXY in native pixels, best first within an image.
        limit: the largest P; an image keeps its best proposals.

    Raises:
        UserError: proposals belong to images that `dataset` does not have, so they were made on other data.
    """

    def __init__(self, dataset: DetectionDataset, image_ids: np.ndarray, boxes: np.ndarray, limit: int) -> None:
        self.dataset = dataset
        self.name, self.generated, self.categories = dataset.name, dataset.generated, dataset.categories
        self.image_ids, self.sizes = dataset.image_ids, dataset.sizes
        self.area_bounds, self.has_masks = dataset.area_bounds, dataset.has_masks
        self.digest, self.box_digest = dataset.digest, dataset.box_digest
        self.repairs: dict[str, int] = getattr(dataset, "repairs", {})
        index = index_of(image_ids, dataset)
        # In the order of the images: the proposals of image n are [offsets[n], offsets[n + 1]).
        order = np.argsort(index, kind="stable")
        index = index[order]
        first = np.searchsorted(index, np.arange(len(dataset)))
        best = np.arange(len(index)) - first[index] < limit
        self._boxes = boxes[order[best]].astype(np.float32, copy=False)
        self._offsets = np.searchsorted(index[best], np.arange(len(dataset) + 1))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        proposals = self._boxes[self._offsets[index] : self._offsets[index + 1]]
        return replace(self.dataset[index], proposals=proposals.copy())

    def coco(self) -> dict[str, Any]:
        return self.dataset.coco()


def index_of(image_ids: np.ndarray, dataset: DetectionDataset) -> np.ndarray:
    """Return the position in the data set of each image id (M,).

    Raises:
        UserError: the data set does not have an image.
    """
    dataset_ids = np.asarray(dataset.image_ids)
    foreign = np.unique(image_ids[~np.isin(image_ids, dataset_ids)])
    if len(foreign):
        raise UserError(
            f"proposals for {len(foreign)} images that {dataset.name} does not have, the first with image id {foreign[0]}"
            ". They were made on other data. Fix: make them on this data set"
        )
    by_id = np.argsort(dataset_ids)
    return by_id[np.searchsorted(dataset_ids, image_ids, sorter=by_id)]

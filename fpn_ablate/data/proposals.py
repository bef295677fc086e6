"""Fixed proposals beside the pictures of a data set, for Fast R-CNN (Table 2) and for training in steps (Tables 3 and 5).

M proposals in all, P of one image.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from fpn_ablate.structures.batch import DetectionDataset, Sample
from fpn_ablate.utils.errors import UserError


class WithProposals(DetectionDataset):
    """A data set whose samples carry proposals; all else is that of `dataset`. An image without any proposal gets 0.

    Args:
        image_ids: (M,) integers, in any order.
        boxes: (M, 4) XYXY in native pixels, best first within an image.
        most: only the best so many of an image are handed out.

    Raises UserError where proposals belong to images that `dataset` does not have: they were made on other data.
    """

    def __init__(self, dataset: DetectionDataset, image_ids: np.ndarray, boxes: np.ndarray, most: int) -> None:
        self.dataset = dataset
        self.name, self.generated, self.categories = dataset.name, dataset.generated, dataset.categories
        self.image_ids, self.sizes = dataset.image_ids, dataset.sizes
        self.area_bounds, self.digest = dataset.area_bounds, dataset.digest
        self.repairs: dict[str, int] = getattr(dataset, "repairs", {})
        index = index_of(image_ids, dataset)
        # In the order of the images: the proposals of image n are [offsets[n], offsets[n + 1]).
        order = np.argsort(index, kind="stable")
        index = index[order]
        first = np.searchsorted(index, np.arange(len(dataset)))
        kept = np.arange(len(index)) - first[index] < most
        self._boxes = boxes[order[kept]].astype(np.float32, copy=False)
        self._offsets = np.searchsorted(index[kept], np.arange(len(dataset) + 1))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        own = self._boxes[self._offsets[index] : self._offsets[index + 1]]
        return replace(self.dataset[index], proposals=own.copy())

    def coco(self) -> dict[str, Any]:
        return self.dataset.coco()


def index_of(image_ids: np.ndarray, dataset: DetectionDataset) -> np.ndarray:
    """(M,) position of each image in the data set."""
    known = np.asarray(dataset.image_ids)
    foreign = np.unique(image_ids[~np.isin(image_ids, known)])
    if len(foreign):
        raise UserError(
            f"proposals for {len(foreign)} images that {dataset.name} does not have, the first with image id {foreign[0]}"
            ". They were made on other data. Fix: proposals made on this data set"
        )
    by_id = np.argsort(known)
    return by_id[np.searchsorted(known, image_ids, sorter=by_id)]

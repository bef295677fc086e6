"""Fixed proposals of one RPN on both splits, cached in one file with their origin. Fast R-CNN of Table 2 learns from them.

M proposals in all. Boxes are (M, 4) XYXY in native pixels, best first within an image.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fpn_ablate.config.schema import Recipe
from fpn_ablate.data.proposals import index_of
from fpn_ablate.engine.evaluate import propose
from fpn_ablate.model.detectors.two_stage import Detector
from fpn_ablate.structures.batch import DetectionDataset, Splits
from fpn_ablate.utils.errors import UserError, first_line
from fpn_ablate.utils.files import open_arrays, write_atomically
from fpn_ablate.utils.locks import exclusive
from fpn_ablate.utils.paths import PROPOSALS

MARGIN = 1.0  # pixels by which rounding may put a box outside its image
DTYPE_KINDS = {"ids": "iu", "boxes": "f", "images": "iu"}  # as numpy's dtype.kind


@dataclass(frozen=True)
class FixedProposals:
    """Proposals on both splits: on training as many per image as a second stage learns from, on validation as it is tested on.

    Attributes:
        train_images, val_images: ids of the images that the RPN has seen, with or without a proposal.
        row, fingerprint: of the run that trained the RPN.
        train_data, val_data: digests of the splits.
    """

    train_ids: np.ndarray
    train_boxes: np.ndarray
    train_images: np.ndarray
    val_ids: np.ndarray
    val_boxes: np.ndarray
    val_images: np.ndarray
    row: str
    fingerprint: str
    train_data: str
    val_data: str

    @staticmethod
    def from_rpn(
        model: Detector, splits: Splits, recipe: Recipe, device: torch.device, row: str, fingerprint: str, workers: int = 0
    ) -> "FixedProposals":
        """Propose on both splits with the RPN of `model`."""
        (training, validation), count = splits, recipe.eval_images
        train = propose(model, training, recipe, device, workers=workers, to_train=True)
        val = propose(model, validation, recipe, device, workers=workers, count=count)
        return FixedProposals(
            *(train.image_ids, train.boxes, np.asarray(training.image_ids)),
            *(val.image_ids, val.boxes, np.asarray(validation.image_ids[:count])),
            *(row, fingerprint, training.digest, validation.digest),
        )

    @staticmethod
    def cached(
        folder: Path, make: Callable[[], "FixedProposals"], splits: Splits, count: int | None, wait: bool = True
    ) -> "FixedProposals":
        """Read the cache in the folder of a finished run; without one, `make` and save. Concurrent runs wait for the first.

        Raises:
            Held: another process makes it, and `wait` is False.
        """
        with exclusive(folder / f".{PROPOSALS}.lock", f"{folder / PROPOSALS}", wait):
            if not (folder / PROPOSALS).exists():
                for leftover in folder.glob(f".{PROPOSALS}.[0-9]*"):  # of a process that was killed while writing
                    leftover.unlink(missing_ok=True)
                proposals = make()
                write_atomically(folder / PROPOSALS, lambda temporary: np.savez_compressed(temporary, **vars(proposals)))
        return FixedProposals.load(folder / PROPOSALS, splits, count, "remove it, and the next run makes it again")

    @staticmethod
    def load(path: Path, splits: Splits, count: int | None, fix: str) -> "FixedProposals":
        """Read a file and check that it covers `splits`, or the first `count` images of validation. `fix` ends the messages.

        Raises:
            UserError: there is no such file, it holds no proposals, or it belongs to other data.
        """
        try:
            with open_arrays(path) as data:
                names = FixedProposals.__annotations__
                values = {name: str(data[name]) if kind is str else data[name] for name, kind in names.items()}
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; {fix}") from None
        except Exception as error:  # numpy and zipfile raise many kinds for a damaged file
            reason = first_line(error)
            raise UserError(f"{path}: not a file of proposals ({reason}); {fix}") from None
        proposals = FixedProposals(**values)
        checks = [("train", splits[0], None), ("val", splits[1], count)]
        for split, dataset, limit in checks[splits[0] is splits[1] :]:  # the same split twice: nothing is trained
            problem = proposals._problem(split, dataset, dataset.image_ids[:limit])
            if problem:
                raise UserError(f"{path}: {problem}; {fix}")
        return proposals

    def _problem(self, split: str, dataset: DetectionDataset, image_ids: list[int]) -> str | None:
        """Say why the proposals of a split cannot be used for `image_ids`; None if they can."""
        arrays = {name: getattr(self, f"{split}_{name}") for name in DTYPE_KINDS}
        for name, array in arrays.items():
            if array.dtype.kind not in DTYPE_KINDS[name] or not array.ndim or array.shape[1:] != (4,) * (name == "boxes"):
                return f"{split}_{name} holds {array.dtype} of shape {array.shape}"
        ids, boxes, images = arrays.values()
        if len(ids) != len(boxes):
            return f"{split}_ids has {len(ids)} entries for {len(boxes)} boxes"
        malformed = ~(np.isfinite(boxes).all(1) & (boxes[:, 2:] >= boxes[:, :2]).all(1))
        if malformed.any():
            number = int(malformed.argmax())
            return f"box {number} of {split}_boxes, of image {ids[number]}, is {boxes[number].tolist()}, not x1, y1, x2, y2"
        if dataset.digest != getattr(self, f"{split}_data"):
            return f"these proposals (of row {self.row}, run {self.fingerprint}) were made on other {split} data"
        missing = np.setdiff1d(image_ids, images)
        if len(missing):
            return f"it lacks {len(missing)} of the {len(image_ids)} {split} images, the first with id {missing[0]}"
        height, width = dataset.sizes[index_of(ids, dataset)].T
        outside = (boxes[:, :2] < -MARGIN).any(1) | (boxes[:, 2] > width + MARGIN) | (boxes[:, 3] > height + MARGIN)
        if outside.any():
            number = int(outside.argmax())
            where = f"of image {ids[number]}, is {boxes[number].tolist()} in {width[number]}x{height[number]} pixels"
            return f"box {number} of {split}_boxes, {where}; {int(outside.sum()) - 1} more boxes lie outside"
        return None

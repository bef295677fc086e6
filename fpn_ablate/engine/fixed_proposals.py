"""Proposals of one RPN for both splits, kept in one file with where they come from: what Fast R-CNN of Table 2 learns from.

M proposals in all. Boxes are (M, 4) XYXY in native pixels, best first within an image.
"""

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fpn_ablate.config.schema import Recipe
from fpn_ablate.data.proposals import index_of
from fpn_ablate.engine.evaluate import propose
from fpn_ablate.model.detectors.two_stage import Detector
from fpn_ablate.structures.batch import DetectionDataset
from fpn_ablate.utils.errors import UserError, first_line
from fpn_ablate.utils.files import write_atomically
from fpn_ablate.utils.locks import exclusive

FILE = "proposals.npz"
BEYOND = 1.0  # pixels that rounding may put a box beyond its image
UNPACKED = 100  # times its size on the disk, at most
Splits = tuple[DetectionDataset, DetectionDataset]  # training and validation; the latter twice where nothing is trained
KINDS = {"ids": "iu", "boxes": "f", "images": "iu"}  # numpy's kinds of number


@dataclass(frozen=True)
class FixedProposals:
    """Training split: as many an image as a second stage is trained on; validation: as it is tested on.

    Attributes:
        train_images, val_images: ids of the images that were looked at, whether anything was found in them or not.
        row, fingerprint: of the run whose RPN made them.
        train_data, val_data: digests of the splits that they belong to.
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
    def of(
        model: Detector, splits: Splits, recipe: Recipe, device: torch.device, row: str, fingerprint: str, workers: int = 0
    ) -> "FixedProposals":
        """What `model` proposes on both splits."""
        (training, validation), count = splits, recipe.eval_images
        train = propose(model, training, recipe, device, workers=workers, to_train=True)
        val = propose(model, validation, recipe, device, workers=workers, count=count)
        return FixedProposals(
            *(train.image_ids, train.boxes, np.asarray(training.image_ids)),
            *(val.image_ids, val.boxes, np.asarray(validation.image_ids[:count])),
            *(row, fingerprint, training.digest, validation.digest),
        )

    @staticmethod
    def kept(folder: Path, make: Callable[[], "FixedProposals"], splits: Splits, count: int | None) -> "FixedProposals":
        """Those in the folder of a finished run; made now if none has asked for them. Runs that start together wait for one."""
        with exclusive(folder / f".{FILE}.lock", f"{folder / FILE}"):
            if not (folder / FILE).exists():
                for leftover in folder.glob(f".{FILE}.[0-9]*"):  # of a process that was killed while it wrote
                    leftover.unlink(missing_ok=True)
                made = make()
                write_atomically(folder / FILE, lambda temporary: np.savez_compressed(temporary, **vars(made)))
        return FixedProposals.load(folder / FILE, splits, count, "remove it, and it is made anew")

    @staticmethod
    def load(path: Path, splits: Splits, count: int | None, instead: str) -> "FixedProposals":
        """Read a file; `instead`: what to do without it, for the messages.

        Raises:
            UserError: no such file, not a file of proposals, or it belongs to other data than these.
        """
        try:
            _refuse_bomb(path)
            with np.load(path, allow_pickle=False) as data:
                names = FixedProposals.__annotations__
                found = FixedProposals(**{name: str(data[name]) if kind is str else data[name] for name, kind in names.items()})
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; {instead}") from None
        except Exception as error:  # of any kind: numpy and zipfile meet whatever a file holds
            reason = first_line(error)
            raise UserError(f"{path}: not a file of proposals ({reason}); {instead}") from None
        wanted = [("train", splits[0], None), ("val", splits[1], count)]
        for split, dataset, most in wanted[splits[0] is splits[1] :]:  # nothing is trained where there is one split
            problem = found._problem(split, dataset, dataset.image_ids[:most])
            if problem:
                raise UserError(f"{path}: {problem}; {instead}")
        return found

    def _problem(self, split: str, dataset: DetectionDataset, wanted: list[int]) -> str | None:
        """Why the proposals of a split cannot be used, or None."""
        arrays = {name: getattr(self, f"{split}_{name}") for name in KINDS}
        for name, array in arrays.items():
            if array.dtype.kind not in KINDS[name] or not array.ndim or array.shape[1:] != (4,) * (name == "boxes"):
                return f"{split}_{name} holds {array.dtype} of shape {array.shape}"
        ids, boxes, images = arrays.values()
        if len(ids) != len(boxes):
            return f"{split}_ids has {len(ids)} entries for {len(boxes)} boxes"
        wrong = ~(np.isfinite(boxes).all(1) & (boxes[:, 2:] >= boxes[:, :2]).all(1))
        if wrong.any():
            number = int(wrong.argmax())
            return f"box {number} of {split}_boxes, of image {ids[number]}, is {boxes[number].tolist()}, not x1, y1, x2, y2"
        if dataset.digest != getattr(self, f"{split}_data"):
            return f"these proposals (of row {self.row}, run {self.fingerprint}) were made on other {split} data"
        missing = np.setdiff1d(wanted, images)
        if len(missing):
            return f"it has nothing on {len(missing)} of the {len(wanted)} {split} images, the first with id {missing[0]}"
        height, width = dataset.sizes[index_of(ids, dataset)].T
        beyond = (boxes[:, :2] < -BEYOND).any(1) | (boxes[:, 2] > width + BEYOND) | (boxes[:, 3] > height + BEYOND)
        if beyond.any():
            number = int(beyond.argmax())
            where = f"of image {ids[number]}, is {boxes[number].tolist()} in {width[number]}x{height[number]} pixels"
            return f"box {number} of {split}_boxes, {where}, and {int(beyond.sum()) - 1} more lie outside"
        return None


def _refuse_bomb(path: Path) -> None:
    """ValueError where a small file unpacks to much. Coordinates hardly shrink at all, ids a thousand times."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > 10**6 + UNPACKED * path.stat().st_size:
        raise ValueError(f"it unpacks to {unpacked:,} bytes")

"""Proposals of one RPN for both splits, kept in one file with where they come from: what Fast R-CNN of Table 2 learns from.

M proposals in all. Boxes are (M, 4) XYXY in native pixels, best first within an image.
"""

import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from filelock import FileLock

from fpn_ablate.errors import UserError
from fpn_ablate.evaluate import propose
from fpn_ablate.files import write_atomically
from fpn_ablate.model.detector import Detector

if TYPE_CHECKING:
    from fpn_ablate.run import Cell

FILE = "proposals.npz"


@dataclass(frozen=True)
class FixedProposals:
    """Training split: as many an image as a second stage is trained on; validation: as it is tested on.

    Attributes:
        row, fingerprint: of the run whose RPN made them.
        train_data, val_data: digests of the splits that they belong to.
    """

    train_ids: np.ndarray
    train_boxes: np.ndarray
    val_ids: np.ndarray
    val_boxes: np.ndarray
    row: str
    fingerprint: str
    train_data: str
    val_data: str

    @staticmethod
    def of(model: Detector, cell: "Cell", row: str, fingerprint: str) -> "FixedProposals":
        """What `model` proposes on the splits of `cell`."""
        train = propose(model, cell.inputs.training, cell.cfg, cell.inputs.device, to_train=True)
        val = propose(model, cell.inputs.validation, cell.cfg, cell.inputs.device, count=cell.cfg.recipe.eval_images)
        splits = cell.inputs.training.digest, cell.inputs.validation.digest
        return FixedProposals(train.image_ids, train.boxes, val.image_ids, val.boxes, row, fingerprint, *splits)

    @staticmethod
    def kept(folder: Path, make: Callable[[], "FixedProposals"], cell: "Cell") -> "FixedProposals":
        """Those in the folder of a finished run; made now if none has asked for them. Runs that start together wait for one."""
        with FileLock(folder / f".{FILE}.lock"):
            if not (folder / FILE).exists():
                made = asdict(make())
                write_atomically(folder / FILE, lambda temporary: np.savez_compressed(temporary, **made))
        return FixedProposals.load(folder / FILE, cell)

    @staticmethod
    def load(path: Path, cell: "Cell") -> "FixedProposals":
        """Read a file.

        Raises:
            UserError: no such file, not a file of proposals, or it belongs to other data than `cell` has.
        """
        try:
            with np.load(path, allow_pickle=False) as data:
                names = FixedProposals.__dataclass_fields__
                values = {name: data[name] if data[name].ndim else str(data[name]) for name in names}
        except FileNotFoundError:
            raise UserError(f"task.proposals.file={path}: no such file") from None
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{path}: not a file of proposals ({reason}); remove it, and it is made anew") from None
        found = FixedProposals(**values)
        for split, own, theirs in (
            ("training", cell.inputs.training.digest, found.train_data),
            ("validation", cell.inputs.validation.digest, found.val_data),
        ):
            if own != theirs:
                raise UserError(
                    f"{path}: these proposals were made on other {split} data (of row {found.row}, run {found.fingerprint}); "
                    "leave task.proposals.file out, and they are made on this data"
                )
        return found

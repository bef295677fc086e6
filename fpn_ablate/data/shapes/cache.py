"""Cache rendered splits on the disk. Processes map the same file into their memory instead of rendering the pictures again.

A split of N pictures is two files in the folder `shapes` of the user's cache (`content.cache_folder`): `.pixels` holds
(N, H, W, 3) uint8 and nothing else, `.npz` the objects with their masks and the digest of the pixels, and is written last.
Where files are absent or damaged, or the disk is full or read-only, the pictures are rendered: that costs time alone.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from shutil import disk_usage

import numpy as np

from fpn_ablate.structures.batch import Sample
from fpn_ablate.utils import rle
from fpn_ablate.utils.console import log_line
from fpn_ablate.utils.content import cache_folder, content_digest
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.files import UNREADABLE, open_arrays, unwritable, write_atomically
from fpn_ablate.utils.hashing import digest, source_digest
from fpn_ablate.utils.imports import closure
from fpn_ablate.utils.locks import exclusive
from fpn_ablate.utils.paths import PACKAGE

LIMIT = 2 * 2**30  # bytes of all splits, as 10,000 pictures of 256 px have; those unused for longest make room for new ones
IN_USE = 3600  # seconds since it was read or written, in which a split is not removed
FREE = 2**30  # bytes that stay free on the disk
RENDERING_UTILS = ("fpn_ablate.utils.seeding", "fpn_ablate.utils.rle")  # the others do not decide what a picture is


def read(split: str, height: int, width: int) -> list[Sample]:
    """Return the pictures of the split with the digest `split`, pixels mapped from the disk; [] if they are not cached."""
    path = _path(split)
    with suppress(UserError, *UNREADABLE), open_arrays(path) as file:
        pixels = path.with_suffix(".pixels")
        if _digest(pixels) != file["digest"].item():
            return []
        ends = np.cumsum(file["counts"])
        boxes, labels = (np.split(file[name], ends[:-1]) for name in ("boxes", "labels"))
        masks = rle.split(file["masks"], file["mask_lengths"])
        masks_of = [masks[end - count : end] for end, count in zip(ends, file["counts"], strict=True)]
        # Copy on write, since torch warns of arrays that are read-only.
        images = np.asarray(np.memmap(pixels, np.uint8, "c", shape=(len(ends), height, width, 3)))
        samples = [to_sample(index, *parts) for index, parts in enumerate(zip(images, boxes, labels, masks_of, strict=True))]
        with suppress(OSError):  # another user's
            os.utime(path)
        return samples
    return []


def write(split: str, samples: Sequence[Sample]) -> None:
    """Cache all pictures of a split, within `rendering`; log a line if the disk or LIMIT has no room for them."""
    path = _path(split)
    pixels, size = path.with_suffix(".pixels"), sum(sample.image.nbytes for sample in samples)
    if size > LIMIT:
        _log_once(f"{size / 2**20:.0f} MiB are more than the cache's {LIMIT / 2**30:.0f} GiB")
        return
    try:
        _make_room(path, size)
        write_atomically(pixels, lambda temporary: _write_pixels(temporary, samples))
        masks, lengths = rle.join([mask for sample in samples for mask in sample.masks or ()])
        columns = {
            "boxes": np.concatenate([sample.boxes for sample in samples]),
            "labels": np.concatenate([sample.labels for sample in samples]),
            "masks": masks,
            "mask_lengths": lengths,
            "counts": np.array([len(sample.labels) for sample in samples]),
            "digest": np.array(_digest(pixels)),
        }
        write_atomically(path, lambda temporary: np.savez(temporary, **columns))
    except UserError as error:
        _log_error(error)


@contextmanager
def rendering() -> Iterator[None]:
    """Let one process at a time render and write a split; the others wait, and can then read what it has written."""
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive(cache_folder() / "shapes.lock", "rendering the generated pictures, once for all"))
        except UserError as error:
            _log_error(error)
        yield


def to_sample(index: int, image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, masks: Sequence[bytes]) -> Sample:
    """Return picture `index` (from 0) of a split as a sample. It has no crowds."""
    return Sample(image, boxes, labels, np.zeros(len(labels), bool), index + 1, masks=masks)


def _path(split: str) -> Path:
    return cache_folder() / "shapes" / f"{digest([split, _renderer()])}.npz"


@lru_cache
def _renderer() -> list[str]:
    """Identify the code that renders, and numpy, whose generators may draw other numbers in another version."""
    files = closure(
        ["fpn_ablate.data.shapes.dataset"],
        {"fpn_ablate": PACKAGE},
        lambda module: module.startswith("fpn_ablate.utils.") and module not in RENDERING_UTILS,
    )
    return [np.__version__, *(source_digest(file) for _, file in sorted(files.items()))]


def _digest(pixels: Path) -> str:
    return content_digest([str(pixels)], "generated pictures")[0]


def _write_pixels(path: Path, samples: Sequence[Sample]) -> None:
    with path.open("wb") as file:
        for sample in samples:
            file.write(sample.image)


def _make_room(path: Path, size: int) -> None:
    """Remove the splits that were unused for longest until LIMIT has room for `size` bytes at `path`.

    Raises:
        UserError: splits in use leave no room, or the disk has too little.
    """
    folder, splits = path.parent, []
    try:
        others = sorted(file for file in folder.glob("*") if file.stem != path.stem)
        for _, group in groupby(others, lambda file: file.stem):
            stats = {file: file.stat() for file in group}
            splits.append((max(s.st_mtime for s in stats.values()), sum(s.st_size for s in stats.values()), list(stats)))
        excess = size + sum(nbytes for _, nbytes, _ in splits) - LIMIT
        for used, nbytes, files in sorted(splits):
            if excess > 0 and used < time.time() - IN_USE:
                for file in files:
                    file.unlink(missing_ok=True)
                excess -= nbytes
        if excess > 0 or disk_usage(folder.parent).free < size + FREE:
            reason = f"beside splits used within {IN_USE // 60} minutes" if excess > 0 else "on the disk"
            raise UserError(f"{folder}: no room for {size / 2**20:.0f} MiB {reason}")
    except OSError as error:
        raise unwritable(folder, error) from None


_logged: set[Path] = set()


def _log_error(error: UserError) -> None:
    """Log what is wrong with the cache's folder, with the fix for it: that of the error is for a run's folder."""
    _log_once(f"{str(error).partition(';')[0]}; FPN_ABLATE_CACHE=FOLDER names another place for them")


def _log_once(reason: str) -> None:
    """Log, once a process and folder, why pictures cannot be cached there."""
    if (folder := cache_folder()) not in _logged:
        _logged.add(folder)
        log_line(f"generated pictures will be rendered again: {reason}")

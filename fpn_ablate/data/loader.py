"""Load batches in an order that depends on (seed, step) alone: equal for all rows, after a resume, with any workers."""

from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import chain, groupby, islice

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fpn_ablate.data.transforms import Item, Resize, collate, prepare
from fpn_ablate.structures.batch import Batch, DetectionDataset
from fpn_ablate.utils import signals
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.seeding import numpy_generator

Index = tuple[int, bool]  # (position of an image in the set, flip it?)
# Steps whose images are sorted by aspect ratio together. At COCO's sizes, 800 px and 16 images a batch, padding adds 79 %
# without sorting, 9 % with a window of 8, 6 % with 16 and 3 % with 64; but the longer the window, the less random the images
# of a step.
WINDOW = 16


@lru_cache(maxsize=2)
def _order(size: int, seed: int, epoch: int) -> np.ndarray:
    return numpy_generator(seed, "order", epoch).permutation(size)


def step_indices(size: int, batch_size: int, seed: int, flip: bool, step: int) -> list[Index]:
    """Return the images of training step `step` (from 0): one permutation of the set an epoch, a fair coin for each flip."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    coins = numpy_generator(seed, "flip", step).random(batch_size) < 0.5
    return [
        (int(_order(size, seed, p // size)[p % size]), bool(coin) and flip) for p, coin in zip(positions, coins, strict=True)
    ]


def step_batches(
    size: int,
    batch_size: int,
    steps: range,
    seed: int,
    flip: bool,
    parts: int = 1,
    aspects: np.ndarray | None = None,
) -> Iterator[list[Index]]:
    """Yield the indices of each step in `steps` as `parts` lists of equal length (it divides `batch_size`); each is a batch.

    With `aspects` (N,), the width / height of each image of the set, a step holds images of similar shape, so that a batch
    needs little padding. The indices of WINDOW steps, or of one epoch if that is shorter, are sorted by aspect ratio, epoch by
    epoch, and cut into steps, which are then shuffled. Sorting changes neither the indices of a window nor their flips. A step
    is the same wherever `steps` begins and whatever the number of parts.
    """
    length = 1 if aspects is None else max(1, min(WINDOW, size // batch_size))
    part = batch_size // parts
    for window, steps_of_window in groupby(steps, lambda step: step // length):
        first = window * length
        batches = [step_indices(size, batch_size, seed, flip, step) for step in range(first, first + length)]
        if aspects is not None:
            batches = _sorted_by_aspect(batches, first * batch_size, size, aspects)
            batches = [batches[n] for n in numpy_generator(seed, "bucket", window).permutation(length)]
        for step in steps_of_window:
            for start in range(0, batch_size, part):
                yield batches[step - first][start : start + part]


def _sorted_by_aspect(batches: list[list[Index]], start: int, size: int, aspects: np.ndarray) -> list[list[Index]]:
    """Sort the indices of a window's steps, the first of which is number `start` of the run, and cut them into steps again."""
    # By epoch first: otherwise an image of two epochs would come twice in a batch.
    keyed = [((start + n) // size, aspects[index[0]], index) for n, index in enumerate(chain.from_iterable(batches))]
    indices = [index for *_, index in sorted(keyed, key=lambda item: item[:2])]
    return [indices[n : n + len(batches[0])] for n in range(0, len(indices), len(batches[0]))]


def _clean_errors(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield the batches of a loader; a worker's UserError is raised without the traceback that torch prepends."""
    try:
        yield from batches
        return
    except UserError as error:
        message = str(error).rpartition("UserError: ")[2].rstrip()
        error.__traceback__ = None  # a frame of torch's holds the error and the loader's iterator, and so its workers
    del batches  # ends the workers now; at Python's exit they would be waited for
    raise UserError(message)


class _Prepared(Dataset):
    """Resize and flip the samples of a set, by their indices. Used in the worker processes."""

    def __init__(self, dataset: DetectionDataset, resize: Resize) -> None:
        self.dataset, self.resize = dataset, resize

    def __getitem__(self, index: Index) -> Item:
        position, flip = index
        return prepare(self.dataset[position], self.resize, flip)

    def __len__(self) -> int:
        return len(self.dataset)


def _loader(dataset: DetectionDataset, batches: Iterable[list[Index]], resize: Resize, workers: int) -> Iterator[Batch]:
    loader = DataLoader(
        _Prepared(dataset, resize),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        # Without a generator of its own, the loader would seed its workers from the global one.
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=signals.outlive_signals,
    )
    return _clean_errors(iter(loader))  # the workers start now


def training_batches(
    dataset: DetectionDataset,
    *,
    resize: Resize,
    batch_size: int,
    steps: range,
    seed: int,
    flip: bool,
    workers: int = 0,
    group_by_aspect: bool = False,
    parts: int = 1,
    ranks: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """Load the batches of `steps`, for each of them `parts` batches of `batch_size / parts` images.

    A resumed run asks for the remaining steps. `group_by_aspect` puts images of similar shape into a step; see `step_batches`.
    With `ranks` (this process, their number) it loads every W-th batch; W divides `parts`.
    """
    aspects = dataset.sizes[:, 1] / dataset.sizes[:, 0] if group_by_aspect else None
    batches = step_batches(len(dataset), batch_size, steps, seed, flip, parts, aspects)
    return _loader(dataset, islice(batches, ranks[0], None, ranks[1]), resize, workers)


def evaluation_batches(
    dataset: DetectionDataset,
    *,
    resize: Resize,
    batch_size: int,
    workers: int = 0,
    count: int | None,
    ranks: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """Load the first `count` images (None: all) once, in order; with `ranks` (this process, their number) every W-th batch."""
    indices = [(i, False) for i in range(len(dataset) if count is None else min(count, len(dataset)))]
    batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)][ranks[0] :: ranks[1]]
    return _loader(dataset, batches, resize, workers)

"""Batches in an order that is a pure function of (seed, step): the same for every row, every resume, any number of workers."""

from collections.abc import Iterator
from functools import lru_cache, partial

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fpn_ablate.data.sample import Batch, DetectionDataset
from fpn_ablate.data.transforms import collate, prepare
from fpn_ablate.seeding import numpy_generator

Draw = tuple[int, bool]  # (index of an image, flip it?)


@lru_cache(maxsize=2)
def _order(size: int, seed: int, epoch: int) -> np.ndarray:
    return numpy_generator(seed, "order", epoch).permutation(size)


def draws(size: int, batch_size: int, seed: int, flip: bool, step: int) -> list[Draw]:
    """The images of training step `step` (from 0): one permutation of the set an epoch, a fair coin for each flip."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    coins = numpy_generator(seed, "flip", step).random(batch_size) < 0.5
    return [
        (int(_order(size, seed, p // size)[p % size]), bool(coin) and flip) for p, coin in zip(positions, coins, strict=True)
    ]


class _Prepared(Dataset):
    """Draws -> resized, flipped items. Lives in the worker processes."""

    def __init__(self, dataset: DetectionDataset, short_side: int, max_side: int, antialias: bool) -> None:
        self.dataset, self.short_side, self.max_side, self.antialias = dataset, short_side, max_side, antialias

    def __getitem__(self, draw: Draw):
        index, flip = draw
        return prepare(self.dataset[index], self.short_side, self.max_side, flip, self.antialias)

    def __len__(self) -> int:
        return len(self.dataset)


def _loader(
    dataset: DetectionDataset, batches: list[list[Draw]], short_side: int, max_side: int, workers: int, antialias: bool
) -> Iterator[Batch]:
    return iter(
        DataLoader(
            _Prepared(dataset, short_side, max_side, antialias),
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=partial(collate, divisor=32),
            pin_memory=torch.cuda.is_available(),
            # The loader seeds its workers from the global generator unless it is given one of its own.
            generator=torch.Generator().manual_seed(0),
        )
    )


def training_batches(
    dataset: DetectionDataset,
    *,
    batch_size: int,
    steps: range,
    seed: int,
    flip: bool,
    short_side: int,
    max_side: int,
    workers: int = 0,
    antialias: bool = True,
) -> Iterator[Batch]:
    """The batches of `steps`; a resumed run asks for the steps that are left."""
    batches = [draws(len(dataset), batch_size, seed, flip, step) for step in steps]
    return _loader(dataset, batches, short_side, max_side, workers, antialias)


def evaluation_batches(
    dataset: DetectionDataset,
    *,
    batch_size: int,
    short_side: int,
    max_side: int,
    workers: int = 0,
    antialias: bool = True,
    count: int | None,
) -> Iterator[Batch]:
    """Every image once, in order; only the first `count` if that is given."""
    draw = [(i, False) for i in range(len(dataset) if count is None else min(count, len(dataset)))]
    batches = [draw[i : i + batch_size] for i in range(0, len(draw), batch_size)]
    return _loader(dataset, batches, short_side, max_side, workers, antialias)

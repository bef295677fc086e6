"""Order, flips and batches are functions of (seed, step), and of nothing else."""

from collections import Counter

import numpy as np
import pytest
import torch

from fpn_ablate.data.loader import draws, evaluation_batches, training_batches
from fpn_ablate.data.sample import Sample


class Numbered:
    """Ten pictures of different sizes whose pixels are their number; picture 3 has no object."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        image = np.full((32 + index, 40, 3), index, np.uint8)
        count = 0 if index == 3 else 1 + index % 2
        boxes = np.tile(np.array([[1, 2, 11, 12]], np.float32), (count, 1))
        return Sample(image, boxes, np.ones(count, np.int64), np.zeros(count, bool), 100 + index)


def training(steps=range(5), seed=0, flip=True, workers=0):
    return list(
        training_batches(
            Numbered(), batch_size=4, steps=steps, seed=seed, flip=flip, short_side=32, max_side=64, workers=workers
        )
    )


def same(a, b):
    return a.image_ids == b.image_ids and all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in ("images", "sizes", "boxes", "labels", "valid")
    )


def test_every_epoch_shows_every_image_once_in_another_order():
    shown = [index for step in range(15) for index, _ in draws(10, 4, 0, True, step)]
    epochs = [shown[i : i + 10] for i in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_a_batch_larger_than_the_set_goes_round():
    counts = Counter(index for index, _ in draws(3, 9, 0, True, 0))
    assert counts == {0: 3, 1: 3, 2: 3}


def test_the_seed_decides_order_and_flips():
    a, again, other = ([draws(100, 4, seed, True, step) for step in range(25)] for seed in (0, 0, 1))
    assert a == again
    assert [[i for i, _ in batch] for batch in a] != [[i for i, _ in batch] for batch in other]
    assert [[f for _, f in batch] for batch in a] != [[f for _, f in batch] for batch in other]


def test_the_global_generators_decide_nothing():
    np.random.seed(0)
    torch.manual_seed(0)
    first = training()
    np.random.seed(1)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert all(same(a, b) for a, b in zip(first, training(), strict=True))
    assert torch.equal(state, torch.get_rng_state())  # and nothing is drawn from them


def test_half_of_the_images_are_flipped_and_none_without_flip():
    flips = [flip for step in range(500) for _, flip in draws(10, 4, 0, True, step)]
    assert abs(np.mean(flips) - 0.5) < 5 * 0.5 / 2000**0.5
    assert len({tuple(flip for _, flip in draws(10, 16, 0, True, step)) for step in range(20)}) == 20  # new coins each step
    assert not any(flip for step in range(20) for _, flip in draws(10, 4, 0, False, step))
    with_flips = [[i for i, _ in draws(10, 4, 0, True, step)] for step in range(5)]
    assert with_flips == [[i for i, _ in draws(10, 4, 0, False, step)] for step in range(5)]


def test_a_flip_moves_the_boxes_with_the_pixels():
    plain, flipped = training(flip=False), training(flip=True)
    coins = [flip for step in range(5) for _, flip in draws(10, 4, 0, True, step)]
    boxes = [(a.boxes[n], b.boxes[n], a.sizes[n, 1]) for a, b in zip(plain, flipped, strict=True) for n in range(4)]
    assert True in coins
    assert False in coins
    for coin, (before, after, width) in zip(coins, boxes, strict=True):
        real = before[before[:, 2] > 0]
        mirrored = torch.stack([width - real[:, 2], real[:, 1], width - real[:, 0], real[:, 3]], -1)
        torch.testing.assert_close(after[: len(real)], mirrored if coin else real)


@pytest.mark.parametrize("start", [1, 3])
def test_a_resumed_run_gets_the_batches_that_are_left(start):
    assert all(same(a, b) for a, b in zip(training()[start:], training(range(start, 5)), strict=True))


def test_workers_change_nothing():
    assert all(same(a, b) for a, b in zip(training(), training(workers=2), strict=True))


def evaluation(count=None, workers=0):
    return list(evaluation_batches(Numbered(), batch_size=4, short_side=32, max_side=64, workers=workers, count=count))


@pytest.mark.parametrize(("count", "expected"), [(None, 10), (10, 10), (6, 6), (99, 10), (1, 1)])
def test_evaluation_sees_each_image_once_in_order_unflipped(count, expected):
    batches = evaluation(count)
    assert [i for batch in batches for i in batch.image_ids] == list(range(100, 100 + expected))
    first = batches[0].boxes[0, 0]  # the one picture that needs no resizing
    torch.testing.assert_close(first, torch.tensor([1.0, 2, 11, 12]))


def test_batches_are_padded_to_the_stride():
    for batch in training():
        assert all(side % 32 == 0 for side in batch.images.shape[-2:])
        assert (batch.sizes.max(0).values <= torch.tensor(batch.images.shape[-2:])).all()

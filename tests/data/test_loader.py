"""Order, flips and batches are functions of (seed, step), and of nothing else."""

from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch

from fpn_ablate.data.loader import WINDOW, evaluation_batches, step_batches, step_indices, training_batches
from fpn_ablate.data.transforms import Resize
from fpn_ablate.structures.batch import Sample


class Numbered:
    """Ten pictures of different sizes whose pixels are their number; picture 3 has no object."""

    sizes = np.array([[32 + index, 40] for index in range(10)])

    def __len__(self):
        return 10

    def __getitem__(self, index):
        image = np.full((32 + index, 40, 3), index, np.uint8)
        count = 0 if index == 3 else 1 + index % 2
        boxes = np.tile(np.array([[1, 2, 11, 12]], np.float32), (count, 1))
        return Sample(image, boxes, np.ones(count, np.int64), np.zeros(count, bool), 100 + index)


def training(steps=range(5), seed=0, flip=True, **options):
    options |= {"resize": Resize(32, 64), "batch_size": 4}
    return list(training_batches(Numbered(), steps=steps, seed=seed, flip=flip, **options))


def same(a, b):
    return a.image_ids == b.image_ids and all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in ("images", "sizes", "boxes", "labels", "valid")
    )


def test_every_epoch_shows_every_image_once_in_another_order():
    shown = [index for step in range(15) for index, _ in step_indices(10, 4, 0, True, step)]
    epochs = [shown[i : i + 10] for i in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_a_batch_larger_than_the_set_goes_round():
    counts = Counter(index for index, _ in step_indices(3, 9, 0, True, 0))
    assert counts == {0: 3, 1: 3, 2: 3}


def test_the_seed_decides_order_and_flips():
    a, again, other = ([step_indices(100, 4, seed, True, step) for step in range(25)] for seed in (0, 0, 1))
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
    flips = [flip for step in range(500) for _, flip in step_indices(10, 4, 0, True, step)]
    assert abs(np.mean(flips) - 0.5) < 5 * 0.5 / 2000**0.5
    assert (
        len({tuple(flip for _, flip in step_indices(10, 16, 0, True, step)) for step in range(20)}) == 20
    )  # new coins each step
    assert not any(flip for step in range(20) for _, flip in step_indices(10, 4, 0, False, step))
    with_flips = [[i for i, _ in step_indices(10, 4, 0, True, step)] for step in range(5)]
    assert with_flips == [[i for i, _ in step_indices(10, 4, 0, False, step)] for step in range(5)]


def test_a_flip_moves_the_boxes_with_the_pixels():
    plain, flipped = training(flip=False), training(flip=True)
    coins = [flip for step in range(5) for _, flip in step_indices(10, 4, 0, True, step)]
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


SIZES = np.random.default_rng(0).integers(300, 640, (1100, 2))  # height, width: half of them upright
ASPECTS = SIZES[:, 1] / SIZES[:, 0]


def flat(lists):
    return list(chain.from_iterable(lists))


def sampled(steps=range(4 * WINDOW), size=500, batch_size=16, seed=0, flip=True, parts=1, aspects=ASPECTS):
    return list(step_batches(size, batch_size, steps, seed, flip, parts, aspects))


@pytest.mark.parametrize("aspects", [None, ASPECTS], ids=["plain", "grouped"])
@pytest.mark.parametrize("parts", [1, 2, 8])
def test_parts_cut_each_step_and_change_nothing(parts, aspects):
    whole, lists = sampled(aspects=aspects), sampled(parts=parts, aspects=aspects)
    assert {len(part) for part in lists} == {16 // parts}
    assert [flat(lists[n : n + parts]) for n in range(0, len(lists), parts)] == whole
    if aspects is None:
        assert whole == [step_indices(500, 16, 0, True, step) for step in range(4 * WINDOW)]


@pytest.mark.parametrize("parts", [1, 4])
def test_a_window_grouped_by_aspect_holds_the_same_draws(parts):
    """Image and flip together, in the first window, in those over the end of an epoch, and in one cut off by the last step."""
    plain, grouped = sampled(aspects=None), sampled(parts=parts)
    assert {len(part) for part in grouped} == {16 // parts} and len(grouped) == parts * len(plain)
    for first in range(0, 4 * WINDOW, WINDOW):
        window = flat(plain[first : first + WINDOW])
        assert sorted(flat(grouped[parts * first : parts * (first + WINDOW)])) == sorted(window)
        assert flat(grouped[parts * first : parts * (first + WINDOW)]) != window


def test_each_list_is_a_run_of_the_sorted_window_and_their_order_is_drawn_anew():
    """Within one epoch."""
    orders = []
    for first in range(0, 4 * WINDOW, WINDOW):
        lists = sampled(range(first, first + WINDOW), size=1100)
        order = np.argsort([ASPECTS[part[0][0]] for part in lists])
        aspects = ASPECTS[[index for n in order for index, _ in lists[n]]]
        assert (np.diff(aspects) >= 0).all()
        orders.append(tuple(order))
    assert len(set(orders)) == 4 and all(order != tuple(range(WINDOW)) for order in orders)


@pytest.mark.parametrize("size", [7, 20, 40, 150, 500])
def test_a_step_holds_few_copies_of_an_image_however_small_the_set(size):
    """Sorted over several epochs, all copies of an image would stand in one batch."""
    for step in sampled(size=size):
        most = max(Counter(index for index, _ in step).values())
        assert most <= -(-16 // size) + 1


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("start", [1, WINDOW - 1, WINDOW, 2 * WINDOW + 5])
def test_grouped_draws_are_a_function_of_seed_and_step(start, parts):
    whole = sampled(parts=parts)
    assert sampled(range(start, 4 * WINDOW), parts=parts) == whole[parts * start :]
    assert sampled(range(start, start + 3), parts=parts) == whole[parts * start : parts * (start + 3)]  # nor of the end
    np.random.seed(start)
    torch.manual_seed(start)
    assert sampled(parts=parts) == whole
    assert sampled(parts=parts, seed=1) != whole


def padded_pixels(lists):
    """Pixels of all batches, padding included, and those of the images alone, at 800 / 1333."""
    sizes = np.array([Resize(800, 1333).size(*size) for size in SIZES.tolist()])
    batches = [sizes[[index for index, _ in part]] for part in lists]
    return sum(len(b) * b[:, 0].max() * b[:, 1].max() for b in batches), sum(b.prod(1).sum() for b in batches)


@pytest.mark.parametrize("parts", [1, 4])
def test_grouping_pads_less(parts):
    plain, own = padded_pixels(sampled(parts=parts, aspects=None))
    grouped, same_own = padded_pixels(sampled(parts=parts))
    assert own == same_own
    assert grouped - own < (plain - own) / 3


def test_a_step_in_parts_is_collated_part_by_part():
    whole, parts = training(), training(parts=2)
    assert [len(batch.image_ids) for batch in parts] == [2] * 10
    assert flat(batch.image_ids for batch in parts) == flat(batch.image_ids for batch in whole)


def test_ranks_load_every_batch_between_them():
    for load, options in ((training, {"parts": 4}), (evaluation, {})):
        whole, shares = load(**options), [load(**options, ranks=(rank, 2)) for rank in range(2)]
        assert len(whole) == sum(map(len, shares)) and all(same(batch, shares[n % 2][n // 2]) for n, batch in enumerate(whole))


def test_grouped_batches_come_from_the_sizes_of_the_set():
    aspects = Numbered.sizes[:, 1] / Numbered.sizes[:, 0]
    for workers in (0, 2):
        batches = training(range(3, 9), group_by_aspect=True, parts=2, workers=workers)
        expected = list(step_batches(10, 4, range(3, 9), 0, True, 2, aspects))
        assert [batch.image_ids for batch in batches] == [[100 + index for index, _ in part] for part in expected]
        assert len(expected) == len(batches) == 12


def evaluation(count=None, workers=0, **options):
    options |= {"batch_size": 4, "resize": Resize(32, 64), "workers": workers}
    return list(evaluation_batches(Numbered(), count=count, **options))


@pytest.mark.parametrize(("count", "expected"), [(None, 10), (10, 10), (6, 6), (99, 10), (1, 1)])
def test_evaluation_sees_each_image_once_in_order_unflipped(count, expected):
    batches = evaluation(count)
    assert [i for batch in batches for i in batch.image_ids] == list(range(100, 100 + expected))
    first = batches[0].boxes[0, 0]  # the one picture that needs no resizing
    torch.testing.assert_close(first, torch.tensor([1.0, 2, 11, 12]))

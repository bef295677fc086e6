"""Exchanges between ranks and the sums of their parts, in forked processes: they need not import torch again."""

import multiprocessing
import os
import signal

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fpn_ablate.engine.distributed import ALONE, Ranks
from fpn_ablate.engine.parts import PartSum, RunningStatistics
from fpn_ablate.utils.errors import RankFailed, UserError
from fpn_ablate.utils.signals import Stopped

PARTS = 4
FORK = multiprocessing.get_context("fork")


def run_rank(store, rank, size, check, results):
    try:
        result = check(Ranks.connect(dist.FileStore(store, size), rank, size))
    except (Exception, Stopped) as error:
        result = error
    results.put((rank, result))
    results.close()
    results.join_thread()
    os._exit(0)  # what pytest does at its exit is not the fork's to do


@pytest.fixture
def on_ranks(tmp_path):
    """`on_ranks(2, check)` -> what `check(ranks)` returns, or raises, on each of two ranks; None: its process was killed."""

    def run(size, check):
        results, store = FORK.Queue(), str(tmp_path / f"{size}")
        processes = [FORK.Process(target=run_rank, args=(store, rank, size, check, results)) for rank in range(size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        found = dict(results.get(timeout=1) for process in processes if process.exitcode == 0)
        return [found.get(rank) for rank in range(size)]

    return run


def sum_of_parts(ranks):
    """Sum numbers whose sum depends on their order, as gradients that part 0 alone has of one parameter, and losses."""
    parameters = [nn.Parameter(torch.zeros(3, 5, 2, 2).to(memory_format=torch.channels_last)), nn.Parameter(torch.zeros(7))]
    unused, sums = nn.Parameter(torch.zeros(2)), None
    sums = PartSum([*parameters, unused], ranks)
    for part in ranks.share(range(PARTS)):
        generator = torch.Generator().manual_seed(part)
        for p in parameters[: None if part == 0 else 1]:
            own = torch.empty_like(p).copy_(10 ** (8 * torch.rand(p.shape, generator=generator)))
            p.grad = own if p.grad is None else p.grad + own  # as autograd accumulates
        sums.add({"a": torch.rand((), generator=generator) * 10**part, "b": torch.tensor(float(part))}, signal=part == 2 and 15)
    losses, stop = sums.finish()
    assert unused.grad is None and parameters[0].grad.stride() == parameters[0].stride()
    return [p.grad.tolist() for p in parameters], {name: float(loss) for name, loss in losses.items()}, stop


def test_sums_over_ranks_are_those_of_one_process_to_the_bit(on_ranks):
    gradients, losses, _ = sum_of_parts(ALONE)
    for size in (2, 4):
        assert on_ranks(size, sum_of_parts) == [(gradients, losses, 15)] * size


def statistics_of_parts(ranks):
    """Train a batch norm that is called twice a part, in three updates; return its state."""
    norm = nn.BatchNorm2d(3)
    statistics = RunningStatistics(norm, PARTS, ranks)
    for step in range(3):
        for part in ranks.share(range(PARTS)):
            images = torch.randn((2, 2, 3, 4, 4), generator=torch.Generator().manual_seed(10 * step + part)) * (1 + part)
            statistics.begin_part()
            for half in images:
                norm(half)
            statistics.add_parts()
    return {name: value.tolist() for name, value in norm.state_dict().items()}


def test_running_statistics_are_those_of_all_parts_in_their_order(on_ranks):
    expected, plain = statistics_of_parts(ALONE), nn.BatchNorm2d(3)
    for step in range(3):
        for part in range(PARTS):
            for half in torch.randn((2, 2, 3, 4, 4), generator=torch.Generator().manual_seed(10 * step + part)) * (1 + part):
                plain(half)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(torch.tensor(expected[name]), value)
    assert on_ranks(2, statistics_of_parts) == [expected] * 2


def test_a_batch_norm_that_averages_all_batches_is_refused_in_parts():
    with pytest.raises(UserError, match="momentum=None"):
        RunningStatistics(nn.BatchNorm2d(3, momentum=None), PARTS, ALONE)
    RunningStatistics(nn.BatchNorm2d(3, momentum=None), 1, ALONE)


def test_what_ranks_gather_is_in_order_and_what_rank_0_decides_is_told(on_ranks):
    def check(ranks):
        return ranks.gather(list(ranks.share("abcdefg"))), ranks.broadcast(f"of rank {ranks.rank}")

    assert on_ranks(3, check) == [(list("abcdefg"), "of rank 0")] * 3
    assert check(ALONE) == (list("abcdefg"), "of rank 0")


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (UserError("a.jpg: cannot be read"), UserError, "rank 1: a.jpg: cannot be read"),
        (torch.cuda.OutOfMemoryError("Tried to\nallocate"), RankFailed, "rank 1: OutOfMemoryError: Tried to"),
        (Stopped(signal.SIGTERM), Stopped, "15"),
        (None, RankFailed, "the process of another rank has ended"),
    ],
)
def test_a_rank_that_fails_ends_the_others_in_words(on_ranks, error, kind, words):
    def check(ranks):
        if ranks.rank != 1:
            ranks.gather([1])  # whatever the others are about
        elif error is None:
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            ranks.exchange(error.code - 128 if isinstance(error, Stopped) else 0, error)

    first, _, third = on_ranks(3, check)
    assert type(first) is type(third) is kind and str(first).startswith(words) and str(third).startswith(words)

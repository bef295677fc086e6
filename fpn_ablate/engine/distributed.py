"""Several processes ("ranks") train one row: plain torch.distributed, gloo on CPUs and NCCL on GPUs.

All ranks run the same code on the same configuration. Rank 0 alone decides, logs, measures and writes, and tells the others
what it has decided. An exchange of two numbers over gloo precedes whatever the ranks send each other: a rank that has failed
(for want of memory, over a damaged picture) takes part in it once more, so that the others raise its error and do not wait for
it. Of a process that is killed the kernel closes the connections, which ends the exchange on all others at once.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import chain, islice, zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from fpn_ablate.utils import signals
from fpn_ablate.utils.errors import RankFailed, UserError, first_line
from fpn_ablate.utils.signals import Stopped

T = TypeVar("T")
# The others wait while rank 0 evaluates, or waits for a lock. That a rank is gone is noticed at once.
TIMEOUT = timedelta(days=2)
_MISSING = object()


@dataclass(frozen=True)
class Ranks:
    """The ranks of a row, as one of them sees them. By default it is alone, and each call returns at once.

    Attributes:
        rank, size: the number of this one, from 0, and how many there are.
        gpu_group: sends tensors on GPUs; None: all are on CPUs.
        lost: says which process has ended when a connection is closed.
    """

    rank: int = 0
    size: int = 1
    gpu_group: dist.ProcessGroup | None = None
    lost: Callable[[], str] = lambda: "the process of another rank has ended"

    @staticmethod
    def connect(store: dist.Store, rank: int, size: int, lost: Callable[[], str] = lost) -> "Ranks":
        """Connect the processes that share `store`; each of them calls this."""
        ranks = Ranks(rank, size, None, lost)
        with ranks.connected():
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        return ranks

    def on(self, device: torch.device) -> "Ranks":
        """Return these ranks, connected to send tensors on `device` too; all of them call this."""
        return replace(self, gpu_group=dist.new_group(backend="nccl")) if device.type == "cuda" else self

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, items: Iterable[T]) -> Iterator[T]:
        """Yield every W-th item, beginning with this rank's number."""
        return islice(items, self.rank, None, self.size)

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Raise `RankFailed` where torch reports a closed connection within the context."""
        try:
            yield
        except RuntimeError as error:  # gloo's have no kind of their own
            raise RankFailed(f"{self.lost()}, and the others cannot go on without it ({first_line(error)})") from None

    def exchange(self, signal: int = 0, error: BaseException | None = None) -> int:
        """Wait until all ranks are here. Return the number of the signal that asked any of them to stop, or 0.

        Args:
            error: this rank has failed, and this is its last exchange.

        Raises:
            UserError, RankFailed, Stopped: another rank has failed: by bad input, otherwise, or by a signal.
        """
        if self.size == 1:
            return signal
        with self.connected():
            state = torch.tensor([signal, error is not None], dtype=torch.int32)
            dist.all_reduce(state, dist.ReduceOp.MAX)
            signal, failed = state.tolist()
            reports: list[Any] = [None] * self.size
            if failed:
                dist.all_gather_object(reports, error and _report(error))
        if failed and not error:
            if signal:
                raise Stopped(signal)
            rank, (kind, text) = next((rank, report) for rank, report in enumerate(reports) if report)
            raise kind(f"rank {rank}: {text}")
        return signal

    def broadcast(self, value: T | None = None) -> T:
        """Return what rank 0 passes; the others wait for it."""
        values = [value]
        if self.size > 1:
            with self._together():
                dist.broadcast_object_list(values, src=0)
        return values[0]  # type: ignore[return-value]

    def gather(self, own: Sequence[T]) -> list[T]:
        """Return the items of all ranks in their order, on every rank; `own` are those of this rank's `share`."""
        shares: list[Any] = [own] * self.size
        if self.size > 1:
            with self._together():
                dist.all_gather_object(shares, own)
        return [item for item in chain.from_iterable(zip_longest(*shares, fillvalue=_MISSING)) if item is not _MISSING]

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Exchange, then send something, without a signal in between: the others would wait for what is sent."""
        with signals.uninterrupted():
            self.exchange()
            with self.connected():
                yield


ALONE = Ranks()


def _report(error: BaseException) -> tuple[type, str]:
    """Return the kind and the text of the error that a rank's failure raises on the others."""
    if isinstance(error, UserError):
        return UserError, str(error)
    return RankFailed, f"{type(error).__name__}: {first_line(error)}"

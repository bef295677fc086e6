"""Put together what the parts of an update give, in their order: the same bits however many ranks share the parts.

Legend: W ranks, A parts of an update (`recipe.accumulate`); rank p % W computes part p, so there are A / W rounds.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fpn_ablate.engine.distributed import Ranks
from fpn_ablate.utils.errors import UserError


class PartSum:
    """Sum the gradients and losses of the parts of one update.

    A process alone adds as autograd does. Of several ranks, each adds up one W-th of all numbers over the parts, and all then
    collect the sums: an all-reduce whose order of summation is fixed. It moves as many bytes as a ring's if A = W.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], ranks: Ranks) -> None:
        self.parameters, self.ranks = parameters, ranks
        self.losses: dict[str, Tensor] = {}
        self.signal = 0
        self.sums: Tensor | None = None  # this rank's W-th
        self.has_gradient = torch.zeros(len(parameters), dtype=torch.int32)

    def add(self, losses: dict[str, Tensor], signal: int = 0) -> None:
        """Add one part of each rank: the gradients that its backward pass has left in the parameters, and its losses.

        Args:
            signal: number of the signal that asked this rank to stop, or 0.
        """
        if self.ranks.size == 1:
            self.losses, self.signal = {name: self.losses.get(name, 0) + loss for name, loss in losses.items()}, signal
            return
        self.losses = losses
        has_gradient = torch.tensor([p.grad is not None for p in self.parameters], dtype=torch.int32)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        flat = torch.cat([value.flatten() for value in (*gradients, *losses.values())])
        flat = F.pad(flat, (0, -len(flat) % self.ranks.size))
        # Memory may end here, so all of it is taken before the exchange that says so.
        received, self.all_sums = torch.empty_like(flat), torch.empty_like(flat)
        self.signal = max(self.signal, self.ranks.exchange(signal))
        with self.ranks.connected():
            dist.all_reduce(has_gradient, dist.ReduceOp.MAX)
            dist.all_to_all_single(received, flat, group=self.ranks.gpu_group)
        self.has_gradient |= has_gradient
        for share in received.chunk(self.ranks.size):
            self.sums = share if self.sums is None else self.sums + share
        for p in self.parameters:
            p.grad = None

    def finish(self) -> tuple[dict[str, Tensor], int]:
        """Leave the sums of gradients in the parameters; return those of losses, and the signal that asked any rank to stop."""
        if self.sums is not None:
            with self.ranks.connected():
                dist.all_gather_into_tensor(self.all_sums, self.sums, group=self.ranks.gpu_group)
            start = 0
            for p, has_gradient in zip(self.parameters, self.has_gradient.tolist(), strict=True):
                if has_gradient:
                    p.grad = torch.empty_like(p).copy_(self.all_sums[start : start + p.numel()].view(p.shape))
                start += p.numel()
            self.losses = dict(zip(self.losses, self.all_sums[start:], strict=False))  # padding follows
        return self.losses, self.signal


class RunningStatistics:
    """Give batch norms that are trained the running statistics of all parts, in their order, whatever rank computes a part.

    Such a norm normalises by the statistics of its part alone. Its running statistics are set to 0 in front of a part, which
    leaves there what it adds to them. One part alone needs none of that.

    Raises:
        UserError: a batch norm averages over all batches (momentum=None), which cannot be put together.
    """

    def __init__(self, model: nn.Module, parts: int, ranks: Ranks) -> None:
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.training]
        self.norms, self.ranks = [norm for norm in norms if norm.track_running_stats and parts > 1], ranks
        if any(norm.momentum is None for norm in self.norms):
            raise UserError("a batch norm with momentum=None cannot be trained in parts: give it a momentum, or freeze it")

    def begin_part(self) -> None:
        """Set the statistics to 0."""
        if self.norms:
            self.before = self._read()
            self._write(torch.zeros_like(self.before))

    def add_parts(self) -> None:
        """Add one part of each rank to the statistics before it."""
        if not self.norms:
            return
        part = self._read()
        parts = part.new_empty(self.ranks.size, *part.shape)
        if self.ranks.size == 1:
            parts[0] = part
        else:
            with self.ranks.connected():
                dist.all_gather_into_tensor(parts.flatten(0, 1), part, group=self.ranks.gpu_group)
        shares = torch.cat([part.new_full((2 * norm.num_features,), 1 - norm.momentum) for norm in self.norms])
        statistics, calls = self.before
        for added, calls_of_part in parts:
            statistics, calls = statistics * shares**calls_of_part + added, calls + calls_of_part
        self._write(torch.stack((statistics, calls)))

    def _read(self) -> Tensor:
        """Return the means and variances of all norms, and for each of these numbers how often its norm was called: (2, C)."""
        statistics = [x for norm in self.norms for x in (norm.running_mean, norm.running_var)]
        calls = [norm.num_batches_tracked.to(norm.running_mean).expand(2 * norm.num_features) for norm in self.norms]
        return torch.stack((torch.cat(statistics), torch.cat(calls)))

    def _write(self, state: Tensor) -> None:
        start = 0
        for norm in self.norms:
            middle, end = start + norm.num_features, start + 2 * norm.num_features
            norm.running_mean.copy_(state[0, start:middle])
            norm.running_var.copy_(state[0, middle:end])
            norm.num_batches_tracked.copy_(state[1, start])
            start = end

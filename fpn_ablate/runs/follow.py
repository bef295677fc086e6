"""A rank but the first: carry out, with the others, the runs that rank 0 sends. `python -m fpn_ablate.runs.follow`"""

import os
import socket
import sys
from contextlib import suppress

import torch

from fpn_ablate.engine import procedures
from fpn_ablate.engine.distributed import Ranks
from fpn_ablate.engine.inputs import Inputs, prepare
from fpn_ablate.runs import stages
from fpn_ablate.runs.ranks import Work, meet
from fpn_ablate.runs.state import Run
from fpn_ablate.utils import signals
from fpn_ablate.utils.errors import RankFailed, UserError
from fpn_ablate.utils.threads import num_threads


def follow() -> int:
    """Follow rank 0 until it has no more work; return the exit code."""
    signals.install_handlers()
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  what it would print, rank 0 prints
    ranks = meet(lambda: "the process of another rank has ended")
    try:
        _carry_out_all(ranks)
    except RankFailed:
        return 1  # rank 0 says it
    except (Exception, signals.Stopped) as error:
        stopped = isinstance(error, signals.Stopped)
        with suppress(RankFailed, signals.Stopped):
            ranks.exchange(error.args[0] if stopped else 0, error)
        return error.code if stopped else 1
    return 0


def _carry_out_all(ranks: Ranks) -> None:
    device: torch.device | None = ranks.broadcast()
    if device is None:
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % max(1, torch.cuda.device_count()))
    ranks, job = ranks.on(device), None
    while work := ranks.broadcast():
        if work.job != job:
            job, inputs = work.job, prepare(work.job)
        _carry_out(work, inputs, ranks)


def _carry_out(work: Work, inputs: Inputs, ranks: Ranks) -> None:
    run = Run(work.cfg, inputs, 0, work.threads)
    different = [key for key in work.facts.keys() | run.facts.keys() if work.facts.get(key) != run.facts.get(key)]
    if different:
        raise UserError(
            f"{socket.gethostname()}: {', '.join(sorted(different))} differ from rank 0's; all processes of a row need one "
            "set of data, weights, code and kind of device, and one folder `out`"
        )
    context = procedures.RunContext(work.cfg, inputs, run.folder, run.fingerprint, work.sources, _log, ranks=ranks)
    with num_threads(work.threads):
        supply = stages.prepare_proposals(context)
        stages.test(context, stages.train(context, supply))


def _log(step: int, values: dict[str, float]) -> None:
    """Log nothing: rank 0 does."""


if __name__ == "__main__":
    sys.exit(follow())

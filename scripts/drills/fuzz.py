"""Bad input of every kind, drawn at random: python scripts/drills/fuzz.py [KIND ...] [--cases N] [--seed S] [--only NUMBER]

Every case must end in something that is taken whole, or in a message for the user (UserError, or the command line's exit code
2). What counts as lost is: any other exception, more than LIMIT seconds or MEMORY of new memory, a message that is empty,
endless or holds control characters, and a silent drop, which each kind looks for in a way of its own: what is taken is compared
with what went in. A case is decided by seed, kind and number, and `--only` runs it again; but for the dates and addresses that
libraries write into pictures, archives and files of weights.

Writes results/reference/reliability/fuzz_<kind>.json.
"""

import argparse
import contextlib
import gc
import json
import logging
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzzing.annotations import Annotations
from fuzzing.checks import Hang, Lost, told, within
from fuzzing.configs import Commands, Configs
from fuzzing.draw import Draw
from fuzzing.pictures import Pictures
from fuzzing.proposals import Proposals
from fuzzing.reports import Names, Records, Tables
from fuzzing.weights import Weights

from fpn_ablate.runs.environment import machine
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.files import save_text

LIMIT = 60.0  # seconds a case may take
MEMORY = 4 << 30  # bytes of address space that all cases together may add
OUT = Path(__file__).parents[2] / "results" / "reference" / "reliability"

KINDS: dict[str, Callable[[Path], Any]] = {
    **{"annotations": Annotations, "pictures": Pictures, "configs": Configs, "commands": Commands},
    **{"proposals": Proposals, "weights": Weights, "records": Records, "names": Names, "tables": Tables},
}


@dataclass
class Outcome:
    """What became of the cases of a kind."""

    counts: Counter = field(default_factory=Counter)
    lost: list[tuple[int, str]] = field(default_factory=list)  # number of the case, what was wrong


def try_kind(name: str, numbers: Sequence[int], seed: int) -> Outcome:
    """Run the cases of a kind with these numbers."""
    outcome = Outcome()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = KINDS[name](Path(folder))
        for number in numbers:
            try:
                with within(LIMIT):
                    outcome.counts[kind.case(Draw(f"{seed}/{name}/{number}"))] += 1
            except UserError as error:
                outcome.counts["refused"] += 1
                with contextlib.suppress(Lost):
                    told(str(error))
                    continue
                outcome.lost.append((number, f"a message that cannot be shown: {ascii(str(error))[:300]}"))
            except (Exception, Hang) as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                at = f"{Path(where.filename).name}:{where.lineno}"
                outcome.lost.append((number, f"{type(error).__name__} at {at}: {ascii(str(error))[:400]}"))
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", choices=[[], *KINDS], metavar="KIND", help=f"of {', '.join(KINDS)} (default: all)")
    parser.add_argument("--cases", type=int, default=2000, help="of each kind (default 2000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the one case of this number, with its traceback")
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder of the JSON files (default {OUT})")
    given = parser.parse_args()
    import torch

    limit_memory()
    logging.disable(logging.WARNING)
    if given.only is not None:
        (name,) = given.kinds
        with tempfile.TemporaryDirectory() as folder, within(LIMIT):
            print(KINDS[name](Path(folder)).case(Draw(f"{given.seed}/{name}/{given.only}")))
        return 0
    lost = 0
    for name in given.kinds or KINDS:
        begun = time.monotonic()
        outcome = try_kind(name, range(given.cases), given.seed)
        seconds, peak = time.monotonic() - begun, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        ways = ", ".join(f"{count} {what}" for what, count in sorted(outcome.counts.items()))
        print(
            f"{name}: {given.cases} cases, {ways}; lost {len(outcome.lost)}; {seconds:.0f} s, peak {peak:.0f} MiB", flush=True
        )
        for number, what in outcome.lost[:20]:
            print(f"  {name} --only {number}: {what}", flush=True)
        content = {
            "fault": f"bad input: {name}",
            "tries": given.cases,
            "lost": len(outcome.lost),
            "how": f"{KINDS[name].how}; {ways}",
            "command": f"python scripts/drills/fuzz.py {name} --cases {given.cases} --seed {given.seed}",
            "machine": machine(torch.device("cpu")),
        }
        save_text(given.out / f"fuzz_{name}.json", json.dumps(content, indent=1) + "\n")
        lost += len(outcome.lost)
    return int(lost > 0)


def limit_memory() -> None:
    """What takes more than MEMORY beyond what the program itself does fails with a MemoryError."""
    import torch  # so that its own is not counted

    torch.set_num_threads(1)
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, resource.RLIM_INFINITY))


if __name__ == "__main__":
    sys.exit(main())

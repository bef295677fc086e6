"""Feed random bad input to the package.

    python scripts/drills/fuzz.py [KIND ...] [--cases N] [--seed S] [--only NUMBER]

Each input must be accepted completely, or rejected with a message for the user (UserError, or the command line's exit code 2).
A case is lost if it ends in any other exception; if it takes more than LIMIT seconds or MEMORY of new memory; if its message is
empty, very long or holds control characters; or if part of the input is dropped silently, which each kind checks by comparing
accepted data with the input. Seed, kind and number determine a case, and `--only` repeats it, except for dates and addresses
that libraries write into pictures, archives and weight files.

Writes results/reference/reliability/fuzz_<kind>.json.
"""

import argparse
import contextlib
import gc
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
from fuzzing.checks import Hang, Lost, check_message, within
from fuzzing.configs import Commands, Configs
from fuzzing.draw import Draw
from fuzzing.pictures import Pictures
from fuzzing.proposals import Proposals
from fuzzing.reports import Links, Names, Plans, Records, Tables
from fuzzing.weights import Weights
from reliability import OUTCOMES, save

from fpn_ablate.utils.errors import UserError

LIMIT = 60.0  # seconds a case may take
MEMORY = 4 << 30  # bytes of address space that all cases of a process may add

KINDS: dict[str, Callable[[Path], Any]] = {
    **{"annotations": Annotations, "pictures": Pictures, "configs": Configs, "commands": Commands},
    **{"proposals": Proposals, "weights": Weights, "records": Records, "names": Names, "tables": Tables},
    **{"plans": Plans, "links": Links},
}


@dataclass
class Outcome:
    """Results of the cases of a kind."""

    counts: Counter = field(default_factory=Counter)
    lost: list[tuple[int, str]] = field(default_factory=list)  # number of the case, finding


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
                    check_message(str(error))
                    continue
                outcome.lost.append((number, f"a message that cannot be shown: {ascii(str(error))[:300]}"))
            except (Exception, Hang) as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                at = f"{Path(where.filename).name}:{where.lineno}"
                outcome.lost.append((number, f"{type(error).__name__} at {at}: {ascii(str(error))[:400]}"))
    return outcome


def main() -> int:
    """Run the cases of each kind and save the outcomes; return 0 if nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", choices=[[], *KINDS], metavar="KIND", help=f"of {', '.join(KINDS)} (default: all)")
    parser.add_argument("--cases", type=int, default=2000, help="cases of each kind (default 2000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="run the case of this number alone, with its traceback")
    parser.add_argument("--out", type=Path, default=OUTCOMES, help="default: results/reference/reliability")
    options = parser.parse_args()
    limit_memory()
    logging.disable(logging.WARNING)
    if options.only is not None:
        (name,) = options.kinds
        with tempfile.TemporaryDirectory() as folder, within(LIMIT):
            print(KINDS[name](Path(folder)).case(Draw(f"{options.seed}/{name}/{options.only}")))
        return 0
    lost = 0
    for name in options.kinds or KINDS:
        began = time.monotonic()
        outcome = try_kind(name, range(options.cases), options.seed)
        seconds, peak = time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        ways = ", ".join(f"{count} {ending}" for ending, count in sorted(outcome.counts.items()))
        print(
            f"{name}: {options.cases} cases, {ways}; lost {len(outcome.lost)}; {seconds:.0f} s, peak {peak:.0f} MiB", flush=True
        )
        for number, finding in outcome.lost[:20]:
            print(f"  {name} --only {number}: {finding}", flush=True)
        content = {
            "fault": f"bad input: {name}",
            "tries": options.cases,
            "lost": len(outcome.lost),
            "how": f"{KINDS[name].how}; {ways}",
        }
        command = f"python scripts/drills/fuzz.py {name} --cases {options.cases} --seed {options.seed}"
        save(options.out / f"fuzz_{name}.json", command, content)
        lost += len(outcome.lost)
    return int(lost > 0)


def limit_memory() -> None:
    """Let allocations of more than MEMORY beyond the program's own fail with a MemoryError."""
    import torch  # first, so that its own memory is not counted

    torch.set_num_threads(1)
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, resource.RLIM_INFINITY))


if __name__ == "__main__":
    sys.exit(main())

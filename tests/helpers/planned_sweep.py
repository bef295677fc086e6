"""A process that has written the plan of a sweep, and does nothing."""

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from fpn_ablate.store.plan import PlannedRun

CODE = """
import json, sys
from pathlib import Path
from fpn_ablate.store.plan import PlannedRun, write_plan
write_plan(Path(sys.argv[1]), [PlannedRun(**run) for run in json.loads(sys.argv[2])])
print("written", flush=True)
input()
"""


@contextmanager
def planned_sweep(runs: Path, planned: Iterable[PlannedRun]) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-c", CODE, str(runs), json.dumps([asdict(run) for run in planned])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "written\n"
        yield process
        process.kill()

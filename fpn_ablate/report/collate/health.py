"""Whether a run may stand in a mean, and the word that its cell shows where it may not."""

import re
from typing import Any

FLOOR = 0.01  # AR@100: a detector that learned anything finds more, and one that did not would be averaged in silence


def state(record: dict[str, Any]) -> str:
    """`finished` for a healthy run; else `unhealthy`, `diverged @ step 120`, `out of memory`, `interrupted`, `failed`, or
    `killed or running`: a process that is killed leaves the record with which it began."""
    status, error = record["status"], str(record.get("error") or "")
    if status == "finished":
        recall = record.get("metrics.AR100")
        return "unhealthy" if recall is not None and recall < FLOOR else status
    if status == "diverged":
        step = re.search(r"\bat step (\d+)", error)
        return f"diverged @ step {step[1]}" if step else status
    if status == "failed" and re.search(r"OutOfMemory|out of memory|MemoryError|can't allocate memory", error):
        return "out of memory"
    return "killed or running" if status == "running" else status


def reason(record: dict[str, Any]) -> str | None:
    """What is to be said of a run that is not healthy."""
    if state(record) == "unhealthy":
        return f"AR@100 {100 * record['metrics.AR100']:.2f} %, less than {100 * FLOOR:g} %"
    return str(record["error"]) if record.get("error") else None

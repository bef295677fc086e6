"""Decide whether a run counts in a mean, and name the state that its cell shows if it does not."""

import re
from typing import Any

MIN_RECALL = 0.01  # AR@100: any detector that learned something exceeds it; one that did not must not enter a mean unnoticed


def state(record: dict[str, Any]) -> str:
    """Return the state of a run.

    `finished` for a healthy run; else `unhealthy`, `diverged @ step 120`, `out of memory`, `interrupted`, `failed`, `running`
    or `killed`: a killed process leaves the record that it wrote when it started. A ledger does not tell the last two apart.
    """
    status, error = record["status"], str(record.get("error") or "")
    if status == "finished":
        recall = record.get("metrics.AR100")
        return "unhealthy" if recall is not None and recall < MIN_RECALL else status
    if status == "diverged":
        step = re.search(r"\bat step (\d+)", error)
        return f"diverged @ step {step[1]}" if step else status
    if status == "failed" and re.search(r"OutOfMemory|out of memory|MemoryError|can't allocate memory", error):
        return "out of memory"
    if status == "running":
        return {True: "running", False: "killed"}.get(record.get("live"), "killed or running")
    return status


def reason(record: dict[str, Any]) -> str | None:
    """Return the message on a run that is not healthy, or None."""
    if state(record) == "unhealthy":
        return f"AR@100 {100 * record['metrics.AR100']:.2f} %, less than {100 * MIN_RECALL:g} %"
    return str(record["error"]) if record.get("error") else None

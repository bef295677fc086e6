"""The record of a run, written last and atomically. A run whose record says "finished" is complete; any other is resumed."""

import json
import re
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fpn_ablate.utils.files import save_text
from fpn_ablate.utils.numbers import is_finite
from fpn_ablate.utils.paths import METRICS, RECORD

FINGERPRINT = re.compile(r"[0-9a-f]{16}")
FORMAT = 1  # of record.json; raised when keys change their meaning


def write(folder: Path, record: dict[str, Any]) -> None:
    text = json.dumps({"format": FORMAT, **record}, indent=1, allow_nan=False) + "\n"
    save_text(folder / RECORD, text)


def read(folder: Path, name: str = RECORD) -> dict[str, Any] | None:
    """Read a run's record, or another JSON object in its folder; None if it is missing or unreadable: it is made again.

    Its fingerprints, of which paths are made, have the form of ours.
    """
    with suppress(OSError, ValueError, RecursionError):
        content = json.loads((folder / name).read_text())
        if isinstance(content, dict) and all(map(_is_fingerprint, _fingerprints(content))):
            return content
    return None


def last_step(folder: Path) -> int:
    """Return the last step that a run has logged.

    Raises:
        OSError, ValueError: it has logged none.
    """
    lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
    with suppress(KeyError, TypeError, RecursionError):
        steps = [json.loads(line)["step"] for line in lines[-2:] if line.endswith("}")]  # the last may be cut
        return max(int(step) for step in steps if is_finite(step))
    raise ValueError("no line of metrics.jsonl names a step")


def _fingerprints(content: dict[str, Any]) -> list[Any]:
    """List the fingerprints in a record: its own, and that of the run whose proposals it uses."""
    parts = [part for part in (content, content.get("proposals")) if isinstance(part, dict)]
    return [part["fingerprint"] for part in parts if "fingerprint" in part]


def _is_fingerprint(value: Any) -> bool:
    return isinstance(value, str) and FINGERPRINT.fullmatch(value) is not None


def now() -> str:
    """Return the current time as records hold it: UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")

"""The record of a run, written last and atomically. A run whose record says "finished" is complete; any other is resumed."""

import json
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fpn_ablate.utils.files import save_text
from fpn_ablate.utils.paths import RECORD

FORMAT = 1  # of record.json; raised when keys change their meaning


def write(folder: Path, record: dict[str, Any]) -> None:
    text = json.dumps({"format": FORMAT, **record}, indent=1, allow_nan=False) + "\n"
    save_text(folder / RECORD, text)


def read(folder: Path, name: str = RECORD) -> dict[str, Any] | None:
    """Read a run's record, or another JSON object in its folder; None if it is missing or unreadable: it is made again."""
    with suppress(OSError, ValueError, RecursionError):
        content = json.loads((folder / name).read_text())
        return content if isinstance(content, dict) else None
    return None


def now() -> str:
    """Return the current time as records hold it: UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")

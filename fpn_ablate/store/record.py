"""The record of a run, written last and in one piece. A run whose record says finished is over; any other is taken up again."""

import json
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fpn_ablate.utils.files import save_text
from fpn_ablate.utils.paths import RECORD

FILE = RECORD


def write(folder: Path, record: dict[str, Any]) -> None:
    text = json.dumps({"format": FORMAT, **record}, indent=1, allow_nan=False) + "\n"
    save_text(folder / FILE, text)


def read(folder: Path) -> dict[str, Any] | None:
    """The record, or None where there is none or it cannot be read (the run is then done again)."""
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads((folder / FILE).read_text())
        return found if isinstance(found, dict) else None
    return None


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


FORMAT = 1  # of record.json: raised when its keys change their meaning

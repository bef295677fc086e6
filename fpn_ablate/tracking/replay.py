"""Copy finished runs to Weights & Biases, each once."""

import os
import re
from pathlib import Path

from fpn_ablate.store import record
from fpn_ablate.tracking.wandb_client import MARKER, Wandb, synced

TIMEOUT = 120.0  # seconds for a run: nothing waits for it


def replay(folder: Path, mode: str, force: bool) -> tuple[str, bool]:
    """Copy a finished run to wandb unless a copy exists.

    Args:
        mode: "online" or "offline".
        force: replace an existing copy, under the same id.

    Returns:
        A line for the user, and False if a finished run has no complete copy.
    """
    content = record.read(folder) or {}
    if content.get("status") != "finished":
        return f"skipped: not finished ({content.get('status', 'no readable record')})", True
    if force or not _copy(folder, mode)[1]:
        Wandb(content, folder, mode).close(timeout=TIMEOUT)
    return _copy(folder, mode)


def _copy(folder: Path, mode: str) -> tuple[str, bool]:
    """Return a line about a run's copy, and whether it is one for this mode."""
    marker = record.read(folder, MARKER) or {}
    if not re.fullmatch(r"wandb/[\w.-]+", str(marker.get("folder"))) or not {"id", "mode"} <= marker.keys():
        return "no complete copy", False
    copy = folder / marker["folder"]
    if marker["mode"] == "online" or synced(copy):
        return f"on wandb as {marker['id']}", True
    return f"offline copy; to send it: wandb sync {os.path.normpath(copy)}", mode == "offline" and copy.is_dir()

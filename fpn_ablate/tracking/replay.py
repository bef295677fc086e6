"""Copy finished runs to Weights & Biases, each once."""

import os
from pathlib import Path

from fpn_ablate.tracking.wandb_client import MARKER, Wandb, read_json, synced
from fpn_ablate.utils.paths import RECORD

TIMEOUT = 120.0  # seconds for a run: nothing waits for it


def replay(folder: Path, mode: str, force: bool) -> tuple[str, bool]:
    """Copy a finished run to wandb unless a copy exists.

    Args:
        mode: "online" or "offline".
        force: replace an existing copy, under the same id.

    Returns:
        A line for the user, and False if a finished run has no complete copy.
    """
    record = read_json(folder / RECORD)
    if record.get("status") != "finished":
        return f"skipped: not finished ({record.get('status', 'no record')})", True
    if force or not _is_copied(folder, mode):
        Wandb(record, folder, mode).close(timeout=TIMEOUT)
    return _copy_status(folder), _is_copied(folder, mode)


def _is_copied(folder: Path, mode: str) -> bool:
    marker = read_json(folder / MARKER)
    sent = marker.get("mode") == "online" or (bool(marker) and synced(folder / marker["folder"]))
    return bool(marker.get("complete")) and (sent or (mode == "offline" and (folder / marker["folder"]).is_dir()))


def _copy_status(folder: Path) -> str:
    marker = read_json(folder / MARKER)
    if not marker.get("complete"):
        return "no complete copy"
    if marker["mode"] == "online" or synced(folder / marker["folder"]):
        return f"on wandb as {marker['id']}"
    return f"offline copy; to send it: wandb sync {os.path.normpath(folder / marker['folder'])}"

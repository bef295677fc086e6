"""Copy finished runs to Weights & Biases, each once."""

import os
from pathlib import Path

from fpn_ablate.tracking.wandb_client import LOG, Wandb
from fpn_ablate.tracking.wandb_process import FINISH_TIMEOUT, MARKER, read_json, synced
from fpn_ablate.utils.paths import RECORD


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
        (folder / MARKER).unlink(missing_ok=True)
        copy = Wandb(record, folder, mode)
        copy.close_timeout = FINISH_TIMEOUT + 5
        copy.close()
    return _copy_status(folder), _is_copied(folder, mode)


def _is_copied(folder: Path, mode: str) -> bool:
    marker = read_json(folder / MARKER)
    sent = marker.get("mode") == "online" or (bool(marker) and synced(folder / marker["folder"]))
    return bool(marker.get("complete")) and (sent or (mode == "offline" and (folder / marker["folder"]).is_dir()))


def _copy_status(folder: Path) -> str:
    marker = read_json(folder / MARKER)
    if not marker.get("complete"):
        return f"no complete copy; see {folder / LOG}"
    if marker["mode"] == "online" or synced(folder / marker["folder"]):
        return f"on wandb as {marker['id']}"
    return f"offline copy; to send it: wandb sync {os.path.normpath(folder / marker['folder'])}"

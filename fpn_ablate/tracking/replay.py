"""Copy finished runs to Weights & Biases, each once."""

import os
from pathlib import Path

from fpn_ablate.tracking.wandb_client import LOG, Wandb
from fpn_ablate.tracking.wandb_process import LIMIT, MARKER, read_json, synced
from fpn_ablate.utils.paths import RECORD


def replay(folder: Path, mode: str, again: bool) -> tuple[str, bool]:
    """Copy a finished run to wandb unless that is done.

    Args:
        mode: "online" or "offline".
        again: copy it even if that is done, under the same id.

    Returns:
        A line about it, and whether it is copied or need not be.
    """
    known = read_json(folder / RECORD)
    if known.get("status") != "finished":
        return f"not finished ({known.get('status', 'no record')}), left out", True
    if again or not _is_copied(folder, mode):
        (folder / MARKER).unlink(missing_ok=True)
        copy = Wandb(known, folder, mode)
        copy.patience = LIMIT + 5
        copy.close()
    return _copy_status(folder), _is_copied(folder, mode)


def _is_copied(folder: Path, mode: str) -> bool:
    marker = read_json(folder / MARKER)
    sent = marker.get("mode") == "online" or (bool(marker) and synced(folder / marker["folder"]))
    return bool(marker.get("complete")) and (sent or (mode == "offline" and (folder / marker["folder"]).is_dir()))


def _copy_status(folder: Path) -> str:
    marker = read_json(folder / MARKER)
    if not marker.get("complete"):
        return f"no complete copy, see {folder / LOG}"
    if marker["mode"] == "online" or synced(folder / marker["folder"]):
        return f"on wandb as {marker['id']}"
    return f"offline copy; to send it: wandb sync {os.path.normpath(folder / marker['folder'])}"

"""Paths of runs, of their files and of their locks; finished runs are found by them."""

from pathlib import Path
from typing import Any

from fpn_ablate.config.schema import Config
from fpn_ablate.store import record
from fpn_ablate.utils.files import leads_out, safe_name
from fpn_ablate.utils.paths import DETECTIONS, METRICS, MODEL

LOCKS = ".locks"  # below the folder of all runs
REQUIRED = (METRICS, MODEL, DETECTIONS)  # files of every finished run, beside config.yaml and record.json


def run_folder(cfg: Config, fingerprint: str) -> Path:
    """Return results/runs/<table>/<recipe>/<row>/seed<k>-<fingerprint>: readable, and different for each run."""
    return row_folder(cfg) / f"seed{cfg.seed}-{fingerprint[:8]}"


def row_folder(cfg: Config) -> Path:
    return Path(cfg.out, "runs", *(safe_name(part) for part in (cfg.table, cfg.recipe.name, cfg.row)))


def run_lock(out: str | Path, fingerprint: str) -> Path:
    """Return the lock file of a run, the same for all tables that contain the run."""
    return Path(out, "runs", LOCKS, fingerprint)


def find_run(out: str | Path, seed: int, fingerprint: str) -> Path | None:
    """Find the folder of a finished run below `out`, in any table, with all its required files."""
    for folder in sorted(Path(out, "runs").glob(f"*/*/*/seed{seed}-{fingerprint[:8]}")):
        if leads_out(out, folder):
            continue
        if is_finished(record.read(folder), fingerprint) and all((folder / name).exists() for name in REQUIRED):
            return folder
    return None


def is_finished(content: dict[str, Any] | None, fingerprint: str) -> bool:
    """Return whether a record says that the run of this fingerprint is finished."""
    return bool(content) and content.get("status") == "finished" and content.get("fingerprint") == fingerprint

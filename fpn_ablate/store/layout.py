"""Say where a run, its files and its lock lie."""

from pathlib import Path

from fpn_ablate.config.schema import Config
from fpn_ablate.utils.files import safe_name
from fpn_ablate.utils.paths import DETECTIONS, METRICS, MODEL

KEPT = (METRICS, MODEL, DETECTIONS)  # beside config.yaml and record.json, of a finished cell


def cell_folder(cfg: Config, fingerprint: str) -> Path:
    """results/runs/<table>/<recipe>/<row>/seed<k>-<fingerprint>: readable, and one cell's own."""
    return _row_folder(cfg) / f"seed{cfg.seed}-{fingerprint[:8]}"


def _row_folder(cfg: Config) -> Path:
    return Path(cfg.out, "runs", *(safe_name(part) for part in (cfg.table, cfg.recipe.name, cfg.row)))


def cell_lock(out: str | Path, fingerprint: str) -> Path:
    """Of a cell, whatever tables it stands in."""
    return Path(out, "runs", ".locks", fingerprint)

"""Paths of the package and of its configuration, and the names of the files in a run's folder."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
# The folder that holds `conf/` and `experiments/`: the checkout, or in a wheel the package itself (pyproject.toml).
ROOT = PACKAGE if (PACKAGE / "conf").is_dir() else PACKAGE.parent
CONF = ROOT / "conf"
EXPERIMENTS = ROOT / "experiments"
CLAIMS = "claims.yaml"  # in a folder of experiments: no experiment, but the claims about their tables

# Files in a run's folder.
CONFIG, RECORD, METRICS, ERROR, SKIP = "config.yaml", "record.json", "metrics.jsonl", "error.txt", "skip.json"
DETECTIONS, ARTIFACTS, PROPOSALS, MODEL = "detections.npz", "artifacts.npz", "proposals.npz", "model.pt"
RESAMPLED = "resampled.npz"  # beside a ledger too, for all its runs
# Small copies of evaluated images, shared by all runs: `<out>/runs/.pictures/<set>/`, with their ground truth in `truth.json`.
PICTURES, TRUTH = ".pictures", "truth.json"

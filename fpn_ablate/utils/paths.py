"""Where the configuration lives: inside the package in a wheel, beside it in a checkout."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
# The folder that holds `conf/` and `experiments/`. In a wheel both ship inside the package (pyproject.toml).
ROOT = PACKAGE if (PACKAGE / "conf").is_dir() else PACKAGE.parent
CONF = ROOT / "conf"
EXPERIMENTS = ROOT / "experiments"
CLAIMS = "claims.yaml"  # in a folder of experiments: no experiment, but what is claimed of their tables
RECORD, METRICS, DETECTIONS, ARTIFACTS = "record.json", "metrics.jsonl", "detections.npz", "artifacts.npz"  # in a run's folder
MODEL = "model.pt"  # likewise: its weights
PICTURES, TRUTH = ".pictures", "truth.json"  # below the folder of all runs, and in each folder there

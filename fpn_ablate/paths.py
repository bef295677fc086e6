"""Where the configuration lives: inside the package in a wheel, beside it in a checkout."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
# The folder that holds `conf/` and `experiments/`. In a wheel both ship inside the package (pyproject.toml).
ROOT = PACKAGE if (PACKAGE / "conf").is_dir() else PACKAGE.parent
CONF = ROOT / "conf"
EXPERIMENTS = ROOT / "experiments"
PLUGINS = PACKAGE / "plugins"
CLAIMS = "claims.yaml"  # in a folder of experiments: no experiment, but what is claimed of their tables

"""Paths of the package, the names of the files in a run's folder, and texts without the folders of a machine."""

import re
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]
# The folder that holds `conf/` and `experiments/`: the checkout, or in a wheel the package itself (pyproject.toml).
ROOT = PACKAGE if (PACKAGE / "conf").is_dir() else PACKAGE.parent
CONF = ROOT / "conf"
EXPERIMENTS = ROOT / "experiments"
CLAIMS = "claims.yaml"  # in a folder of experiments: no experiment, but the claims about their tables

# Files in a run's folder.
CONFIG, RECORD, METRICS, ERROR, SKIP = "config.yaml", "record.json", "metrics.jsonl", "error.txt", "skip.json"
DETECTIONS, ARTIFACTS, PROPOSALS, MODEL = "detections.npz", "artifacts.npz", "proposals.npz", "model.pt"
INSPECTED = ("level_", "added_", "found_", "mapped_")  # beginnings of the names in ARTIFACTS of what a pyramid computes
PROPOSED = "proposed.npz"  # on the evaluated images, where the recall of proposals is evaluated beside detections
THROUGHPUT = "throughput.jsonl"  # images per second, apart from METRICS, which a resumed run repeats to the same bits
RESAMPLED = "resampled.npz"  # beside a ledger too, for all its runs
BACKBONES = "backbones"  # below <out>: weights of pre-training, each with the lock of the process that makes it
# Small copies of evaluated images, shared by all runs: `<out>/runs/.pictures/<set>/`, with their ground truth in `truth.json`,
# and the masks of its objects, if a run has masks.
PICTURES, TRUTH, TRUE_MASKS = ".pictures", "truth.json", "masks.json"

# The folders of a path that only one machine has; {0}: what the name of a folder there does not hold. Addresses are kept.
_FOLDERS = r"""
    (?<![\w.~…/\\<-]) (?P<address> (?!file:) \w+://\S* )
    | (?: (?<![\w.~…/\\<-]) (?:file:/*)? (?: ~[\w.-]*[\\/] | [A-Za-z]:[\\/] | \\\\ | / | (?:\.\.[\\/])+ ) [\\/]* (?=[\w.~…-])
      | (?<=[=,\[]) ~[\w.-]+ (?![\w.\\/-]) )
      (?: [^{0}\\/]+ [\\/]+ )*"""
_BARE, _QUOTED = (re.compile(_FOLDERS.format(end), re.VERBOSE) for end in (r"\s'\",:;=()\[\]{{}}", r"'\""))


def short_name(table: str) -> str:
    """Return the short name by which `+experiments=` finds a table: table1 of table1_rpn."""
    return re.sub(r"^(table\d+)_.*", r"\1", table)


def without_folders(value: Any) -> Any:
    """Shorten the absolute and the home paths in a text, or in the texts of nested lists and dictionaries, to their last part.

    What is published (ledger, page, wandb) names no machine's folders: `/home/me/sets/bccd` and `//host/share/bccd` become
    `…/bccd`.
    """
    if isinstance(value, dict):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(item) for item in value]
    if not isinstance(value, str):
        return value
    quoted = re.sub(r"'[^'\n]*'|\"[^\"\n]*\"", lambda match: _QUOTED.sub(_last_part, match[0]), value)  # with spaces in names
    return _BARE.sub(_last_part, quoted)


def _last_part(match: re.Match[str]) -> str:
    return match["address"] or "…/"

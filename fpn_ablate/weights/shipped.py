"""The weights that come with the package (`backbone.weights=shipped`): one file, whatever the data, as ImageNet's weights are.

`scripts/shipped_weights.py` makes SHIPPED/NAME.safetensors, and NAME.json that says how it was made: sha256 of the file,
accuracy on held-out pictures, recipe, world and RENDERER (data/shapes/world.py), threads, device and torch's version.
"""

import hashlib
import json
from pathlib import Path

from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.files import UNREADABLE
from fpn_ablate.utils.paths import PACKAGE

SHIPPED = PACKAGE / "weights" / "shipped"


def find_shipped(backbone: str) -> tuple[Path, float]:
    """Return the file of a backbone's shipped weights, and their accuracy on held-out pictures (0..1).

    Raises:
        UserError: it is missing, or not the file that its description is of.
    """
    path = SHIPPED / f"{backbone}.safetensors"
    try:
        facts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        accuracy, expected, actual = float(facts["accuracy"]), facts["sha256"], hashlib.sha256(path.read_bytes()).hexdigest()
        problem = "" if actual == expected else f"its sha256 is {actual}, not {expected}"
    except UNREADABLE as error:
        problem = f"missing or not readable ({error})"
    if problem:
        raise UserError(
            f"backbone.weights=shipped: {path}: {problem}. Install the package again, or set backbone.weights=pretrain, which "
            "trains them in minutes"
        )
    return path, accuracy

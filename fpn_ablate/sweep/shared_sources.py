"""Find what several rows of a sweep build on, so that it is made once and first, and no row waits for another.

Runs are recognised by their configurations. A row whose sources are its own makes them itself.
"""

import glob
from collections.abc import Iterator, Mapping
from pathlib import Path

from fpn_ablate.config.schema import Config
from fpn_ablate.config.sources import sources
from fpn_ablate.runs import identity, skip
from fpn_ablate.store.layout import run_folder
from fpn_ablate.utils.files import safe_name
from fpn_ablate.utils.hashing import digest
from fpn_ablate.utils.paths import PROPOSALS


def shared_sources(cells: Mapping[int, Config]) -> list[int]:
    """Return the numbers of a few cells that build, together, on each thing that several build on and that is not made.

    In any doubt a thing counts as not made; the job that is to make it then finds out.
    """
    users: dict[str, list[int]] = {}
    for number, cfg in cells.items():
        for key in _unfinished(cfg):
            users.setdefault(key, []).append(number)
    chosen: set[int] = set()
    for numbers in sorted(users.values(), key=len):  # a job that makes an RPN makes the pre-training of all rows as well
        if len(numbers) > 1 and not chosen & set(numbers):
            chosen.add(numbers[0])
    return sorted(chosen)


def _unfinished(cfg: Config) -> Iterator[str]:
    """Yield a key of each thing that a cell builds on, unless it is made."""
    inputs = [cfg.out, cfg.data.model_dump(mode="json"), cfg.backbone.model_dump(mode="json")]
    for role, source in sources(cfg).items():
        content = skip.finished_record(source)
        folder = run_folder(source, content["fingerprint"]) if content else None
        if not (folder and (role != "rpn" or (folder / PROPOSALS).exists())):
            yield digest([inputs, identity.requested(source)])
    if cfg.mode == "train" and cfg.backbone.weights == "pretrain":
        # Weights of any recipe and data: should they be others, the first row makes its own, and the others are launched again.
        weights = f"{glob.escape(safe_name(cfg.backbone.label))}-????????????.pt"
        if not any(Path(cfg.out, "backbones").glob(weights)):
            yield digest([inputs, cfg.recipe.pretrain.model_dump(mode="json")])

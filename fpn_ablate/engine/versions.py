"""Hash the code that decides figures: the core that all rows share, and the parts that a row uses.

Modules are found by following imports, not by a list. So a new part changes the identity of no row but its own.
"""

import ast
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from fpn_ablate.config import user_parts
from fpn_ablate.config.factors import under
from fpn_ablate.config.parts import AnyBackbone, UserPart
from fpn_ablate.config.schema import Config
from fpn_ablate.utils.hashing import digest, source_digest
from fpn_ablate.utils.imports import closure, imports_of
from fpn_ablate.utils.paths import PACKAGE

# Each row runs these, and what they import. The modules of heads hold built-in parts, and code that all rows use.
CORE = tuple(
    f"fpn_ablate.{module}"
    for module in (
        *("config.sources", "engine.evaluate", "engine.procedures"),
        *("model.heads.box_head", "model.heads.rpn", "utils.rle", "utils.seeding"),
    )
)
# Values are in the configuration, and parts count where they are used. Bookkeeping, checks and summaries decide no figure.
NOT_HASHED = ("config", "engine.versions", "model.contracts", "model.parts", "model.summary", "store", "utils")
# What is imported beside the code that pre-training runs.
NOT_IN_PRETRAINING = ("data.shapes.dataset", "engine.train", "model.anchors", "model.detectors", "model.heads", "model.necks")


def core_version() -> str:
    """Hash the code that decides the figures of all rows. Loads no torch."""
    return digest(_digests(_core()))


def part_versions(cfg: Config) -> dict[str, dict[str, str]]:
    """Return {dotted key: {module: hash}} of the parts that a row and the runs that it builds on use, core left out.

    Raises:
        UserError: a file of a user's part cannot be read.
    """
    return {key: _part_version(key, part, _core()) for key, part in cfg.parts.items()}


def pretraining_version(backbone: AnyBackbone) -> str:
    """Hash the code that decides the pre-trained weights of a backbone."""
    files = _follow(["fpn_ablate.engine.pretrain"], _listed_modules(), NOT_IN_PRETRAINING)
    return digest([_digests(files), _part_version("backbone", backbone, files)])


@lru_cache
def _core() -> dict[str, Path]:
    return _follow(CORE, _listed_modules())


def _part_version(key: str, part: Any, core: Collection[str]) -> dict[str, str]:
    """Hash the code of a part: its own, and all that it imports from this package but `core`."""
    if isinstance(part, UserPart):
        own = {part.class_: user_parts.content_digest(part)}
        sources = user_parts.sources(part).items()
        modules = [name for module, (file, text) in sources for name in imports_of(file, module, text)]
    else:
        from fpn_ablate.model import parts  # loads torch

        lists = {"backbone": parts.BACKBONES, "rpn.head": parts.RPN_HEADS, "task.roi.head": parts.BOX_HEADS}
        lists |= {"task.mask.head": parts.MASK_HEADS, "task": parts.DENSE_HEADS, "image_pyramid": parts.DETECTORS}
        names = ("2fc", "conv5") if part == "auto" else (getattr(part, "name", part),)
        own, modules = {}, [lists.get(key, parts.NECKS)[name].__module__ for name in names]
    return own | _digests({module: file for module, file in _follow(modules).items() if module not in core})


def _follow(modules: Iterable[str], parts: Collection[str] = (), others: Collection[str] = ()) -> dict[str, Path]:
    """Return {module: file} of modules of this package and what they import, without `parts` and what is under `others`."""

    def skip(module: str) -> bool:
        is_core = module in CORE or not (module in ("fpn_ablate", *parts) or under(module, NOT_HASHED, "fpn_ablate."))
        return not is_core or under(module, others, "fpn_ablate.")

    return closure(modules, {"fpn_ablate": PACKAGE}, skip)


def _listed_modules() -> set[str]:
    """Return the modules of all built-in parts, read from the source of `model.parts`."""
    tree = ast.parse((PACKAGE / "model" / "parts.py").read_text(encoding="utf-8"))
    assigned = [node.value for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign) and node.value]
    listed = {name.id for value in assigned for name in ast.walk(value) if isinstance(name, ast.Name)}
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return {str(node.module) for node in imports for alias in node.names if (alias.asname or alias.name) in listed}


def _digests(files: Mapping[str, Path]) -> dict[str, str]:
    return {module: source_digest(file) for module, file in sorted(files.items())}

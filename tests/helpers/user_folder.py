"""A folder for --config-dir with a neck of the user's: `necks.PathAggregation`, `neck=pan` and `ablation=pan`."""

import textwrap
from pathlib import Path

# A neck of lateral connections alone.
NECKS = """
    from __future__ import annotations

    from typing import TYPE_CHECKING, Literal

    from torch import nn

    from fpn_ablate.model.necks.base import Neck
    from fpn_ablate.structures.levels import Level

    from .blocks import Block

    if TYPE_CHECKING:
        from collections.abc import Sequence

        from fpn_ablate.structures.levels import Features


    class PathAggregation(Neck):
        def __init__(
            self,
            in_levels: Sequence[Level],
            *,
            channels: int,
            depth: int = 1,
            gain: float = 1.0,
            sizes: tuple[int, ...] = (),
            kind: Literal["a", "b"] | None = "a",
        ) -> None:
            super().__init__()
            self.depth, self.gain, self.sizes = depth, gain, sizes
            self.levels = tuple(Level(f"p{level.name[1:]}", channels) for level in in_levels)
            self.blocks = nn.ModuleDict({f"p{level.name[1:]}": Block(level.channels, channels) for level in in_levels})

        def forward(self, features: Features) -> Features:
            return {name: block(features[f"c{name[1:]}"]) for name, block in self.blocks.items()}
"""
BLOCKS = """
    from torch import nn


    class Block(nn.Conv2d):
        def __init__(self, before: int, after: int) -> None:
            super().__init__(before, after, 1)
"""
FILES = {
    "necks.py": NECKS,
    "blocks.py": BLOCKS,
    "neck/pan.yaml": "class: necks.PathAggregation\nchannels: ${recipe.channels}\n",
    "ablation/pan.yaml": "# @package _global_\ndefaults: [{override /neck: pan}]\n",
}


def write(folder: Path, files: dict[str, str] | None = None) -> Path:
    """Write `files` below a folder, by default those of the neck; return the folder."""
    for name, text in (FILES if files is None else files).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(textwrap.dedent(text).lstrip("\n"), encoding="utf-8")
    return folder

"""Tell from size and times whether files have changed."""

import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from fpn_ablate.utils.hashing import digest

# Seconds. What was changed so shortly before it was read, or later, may be changed again and look the same: times are coarse.
RECENT = 2.0


def stamps_of(paths: Iterable[Path | str]) -> dict[str, tuple[str, int]]:
    """Of each file or folder, as it is now: what tells its state from any other, and when that came about (ns)."""
    _stamp.cache_clear()
    return {path: _stamp(path) for path in map(os.path.abspath, paths)}


def is_recent(stamps: dict[str, tuple[str, int]], begun: float) -> bool:
    """Whether any of them may have changed since `begun`, or just before."""
    return any(newest >= (begun - RECENT) * 1e9 for _, newest in stamps.values())


@lru_cache
def _stamp(path: str) -> tuple[str, int]:
    """See `stamps_of`. Of a folder: of the files in it."""
    if os.path.isdir(path):
        with os.scandir(path) as entries:
            found = sorted((entry.name, entry.stat()) for entry in entries if entry.is_file())
    else:
        found = [("", os.stat(path))]
    facts = [(name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for name, s in found]
    return digest(facts), max((fact[3] for fact in facts), default=0)

"""Detect changed files by their sizes and times."""

import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from fpn_ablate.utils.hashing import digest

# Seconds. Times of files are coarse: a file changed this shortly before it was read may change again and look the same.
RECENT = 2.0


def stamps_of(paths: Iterable[Path | str]) -> dict[str, tuple[str, int]]:
    """Return, by absolute path, a digest of each file's or folder's current state and the time of its last change (ns)."""
    stamp_of.cache_clear()
    return {path: stamp_of(path) for path in map(os.path.abspath, paths)}


def is_recent(stamps: dict[str, tuple[str, int]], begun: float) -> bool:
    """Return whether any of the files may have changed after, or less than RECENT seconds before, the time `begun`."""
    return any(newest >= (begun - RECENT) * 1e9 for _, newest in stamps.values())


@lru_cache
def stamp_of(path: str) -> tuple[str, int]:
    """Return the digest and time of one path; for a folder, of the files in it."""
    if os.path.isdir(path):
        with os.scandir(path) as entries:
            stats = sorted((entry.name, entry.stat()) for entry in entries if entry.is_file())
    else:
        stats = [("", os.stat(path))]
    facts = [(name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for name, s in stats]
    return digest(facts), max((fact[3] for fact in facts), default=0)

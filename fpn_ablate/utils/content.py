"""Digest the content of many files, and cache the digest by their stamps.

The cache is a file for each list of paths in the user's cache folder: results may lie in a shared folder, and it names paths.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import track

from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.files import UNREADABLE, save_text
from fpn_ablate.utils.hashing import digest
from fpn_ablate.utils.stamps import RECENT

WHOLE = 4 * 2**30  # bytes of all files, up to which their whole content is read
EDGE = 16 * 2**10  # bytes read at each end of a file beyond that
CONTENT, SAMPLES = "content", "size and 32 KiB of each file"
SLOW = 2**29  # bytes: about two seconds, from which a terminal shows a bar
THREADS = 8  # hashlib releases the GIL; network disks answer several readers at once
CHUNK = 32  # files of one task


def content_digest(paths: Sequence[str], what: str) -> tuple[str, str]:
    """Return the sha256 of the files' contents in their order, without their names, and what it covers: CONTENT or SAMPLES.

    Args:
        what: name of the files, for the progress bar.

    Raises:
        UserError: a file cannot be read.
    """
    start = time.time()
    try:
        stats = [os.stat(path) for path in paths]
        stamps = digest([[s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev] for s in stats])
        cache, total = cache_folder() / f"{digest(list(paths))}.json", sum(s.st_size for s in stats)
        with suppress(*UNREADABLE):
            entry = json.loads(cache.read_text())
            if entry["stamps"] == stamps and entry["covers"] in (CONTENT, SAMPLES):
                return bytes.fromhex(entry["digest"]).hex(), entry["covers"]
        covers = CONTENT if total <= WHOLE else SAMPLES
        sha, amount = hashlib.sha256(covers.encode()), min(total, 2 * EDGE * len(paths)) if covers == SAMPLES else total
        for one in _digests(paths, covers == SAMPLES, f"{what}: hashing", amount >= SLOW):
            sha.update(one)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None
    # A file changed just now may change again and keep its stamp.
    if all(s.st_ctime_ns < (start - RECENT) * 1e9 for s in stats):
        with suppress(UserError):  # the cache only saves time
            save_text(cache, json.dumps({"stamps": stamps, "digest": sha.hexdigest(), "covers": covers}))
    return sha.hexdigest(), covers


def cache_folder() -> Path:
    """Return the user's cache folder, FPN_ABLATE_CACHE or one below ~/.cache; it need not exist."""
    if folder := os.environ.get("FPN_ABLATE_CACHE"):
        return Path(folder)
    with suppress(RuntimeError):  # no home
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fpn-ablate"
    return Path(os.devnull)  # nothing can be written below it


def _digests(paths: Sequence[str], sampled: bool, title: str, slow: bool) -> Iterator[bytes]:
    chunks = [paths[n : n + CHUNK] for n in range(0, len(paths), CHUNK)]
    with ThreadPoolExecutor(THREADS) as pool:
        done = pool.map(partial(_digest_files, sampled=sampled), chunks)
        if slow and sys.stderr.isatty():
            done = track(done, title, total=len(chunks), console=Console(stderr=True), transient=True)
        for several in done:
            yield from several


def _digest_files(paths: Sequence[str], sampled: bool) -> list[bytes]:
    return [_sample_digest(path) if sampled else _whole_digest(path) for path in paths]


def _whole_digest(path: str) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _sample_digest(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        size, head = os.fstat(file.fileno()).st_size, file.read(EDGE)
        file.seek(max(0, size - EDGE))
        return hashlib.sha256(size.to_bytes(8) + head + file.read(EDGE)).digest()

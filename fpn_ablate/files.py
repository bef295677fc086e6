"""Files that are whole or not there: written beside, flushed to the disk, then renamed."""

import os
from collections.abc import Callable
from pathlib import Path

FORMAT = 1  # of record.json: raised when its keys change their meaning


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary path in the same folder and move the result to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own a process; not mkstemp, whose files nobody else may read (records on a shared disk).
    temporary = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise

"""Skip finished runs without importing torch or reading data and weights.

Each start that ends with a finished run writes `skip.json` into the run's folder (`write_skip_entry`): a digest of the request
(configuration, folders, machine, code, user's parts) and a stamp of each file that was read. While none of them changes, the
run is the same (`finished_record`). In any doubt the run is not skipped; `runs.run` then reads everything and decides.
"""

import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fpn_ablate.config import user_parts
from fpn_ablate.config.schema import INCIDENTAL, Config, TimmBackbone
from fpn_ablate.store.layout import REQUIRED, row_folder, run_folder
from fpn_ablate.utils.console import log_line
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.files import UNREADABLE, save_text
from fpn_ablate.utils.hashing import digest
from fpn_ablate.utils.paths import CONFIG, PACKAGE, RECORD, SKIP
from fpn_ablate.utils.stamps import is_recent, stamp_of, stamps_of

if TYPE_CHECKING:
    from fpn_ablate.engine.inputs import Inputs

# Keys of INCIDENTAL that decide all the same, once a machine gives `auto` its meaning.
_DECIDING = ("device", "deterministic")
# GPUs whose names only torch knows: of WSL, Tegra and AMD.
_UNKNOWN = ("dxg", "nvhost*", "nvgpu*", "kfd")
# Environment variables that decide which GPU torch sees, and where it keeps downloaded weights.
_VARIABLES = ("CUDA", "NVIDIA", "TORCH", "PYTORCH", "XDG_CACHE_HOME")


def print_finished(cfg: Config, folder: Path) -> None:
    """Print that a run was finished before."""
    log_line(f"{cfg.row} seed {cfg.seed}: finished before, {folder}")


def finished_record(cfg: Config) -> dict[str, Any] | None:
    """Return the record of a run that is certainly finished, with all its files; None otherwise."""
    with suppress(UserError, *UNREADABLE):
        request = request_digest(cfg)
        for folder in sorted(row_folder(cfg).glob(f"seed{cfg.seed}-*")) if request else ():
            if record := _entry_record(folder, request):
                return record
    return None


def report_if_finished(cfg: Config) -> bool:
    """Return whether a run is certainly finished; if so, print it."""
    record = finished_record(cfg)
    if record:
        print_finished(cfg, run_folder(cfg, record["fingerprint"]))
    return record is not None


def write_skip_entry(cfg: Config, inputs: "Inputs", fingerprint: str, start: float) -> None:
    """Write the skip entry of a finished run, unless a file may have changed since `start`, the time before any was read.

    Errors are ignored: an entry only saves time.
    """
    with suppress(UserError, *UNREADABLE):
        stamps, request = stamps_of(_files_read(cfg, inputs)), request_digest(cfg)
        if request is None or is_recent(stamps, start):
            return
        if inputs.pretrained:  # may be as new as this run, but is written atomically: another content is another file
            stamps |= stamps_of([inputs.pretrained.path])
        folder = run_folder(cfg, fingerprint)
        sizes = {name: (folder / name).stat().st_size for name in (RECORD, *REQUIRED)}
        digests = {path: stamp for path, (stamp, _) in stamps.items()}
        content = {"request": request, "fingerprint": fingerprint, "sizes": sizes, "stamps": digests}
        text = json.dumps(content, indent=1) + "\n"
        if not (folder / SKIP).is_file() or (folder / SKIP).read_text() != text:
            save_text(folder / SKIP, text)


def _entry_record(folder: Path, request: str) -> dict[str, Any] | None:
    """Return a folder's record if its skip entry is of this request and no file has changed since; None otherwise."""
    with suppress(*UNREADABLE):
        entry = json.loads((folder / SKIP).read_text())
        record = json.loads((folder / RECORD).read_text())
        complete = all((folder / name).stat().st_size == size for name, size in entry["sizes"].items())
        unchanged = entry["request"] == request and all(stamp_of(path)[0] == stamp for path, stamp in entry["stamps"].items())
        if complete and unchanged and (record["status"], record["fingerprint"]) == ("finished", entry["fingerprint"]):
            return record
    return None


def request_digest(cfg: Config) -> str | None:
    """Hash everything that identifies a run, except the contents of data and weights; None if that needs torch or timm.

    Raises:
        UserError: a file of a user's part cannot be read.
    """
    machine = _machine(cfg.device)
    if machine is None or isinstance(cfg.backbone, TimmBackbone):
        return None
    config = cfg.model_dump(mode="json", exclude=set(INCIDENTAL) - set(_DECIDING))
    places = [str(Path(cfg.out).resolve()), str(Path.cwd()), str(Path.home())]  # paths may be relative
    return digest([config, places, machine, _program(), user_parts.describe(cfg.user_parts)])


@lru_cache
def _program() -> list[Any]:
    """Return the code's hash, the versions of packages that choose default weights, and the variables that they read."""
    sha = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        sha.update(path.read_bytes())
    variables = sorted(item for item in os.environ.items() if item[0].startswith(_VARIABLES))
    return [sha.hexdigest(), platform.python_version(), version("torch"), version("torchvision"), variables]


@lru_cache
def _machine(device: str) -> list[str] | None:
    """Return what identifies the device without asking torch; None if only torch can tell."""
    if sys.platform != "linux" or any(any(Path("/dev").glob(name)) for name in _UNKNOWN):
        return None
    from fpn_ablate.runs.environment import processor

    if device == "cpu":
        return [processor()]
    driver = Path("/proc/driver/nvidia")
    files = [*driver.glob("version"), *driver.glob("gpus/*/information")]
    # The GPUs that a container sees, and their MIG parts.
    names = [*Path("/dev").glob("nvidia*"), *driver.glob("capabilities/**/*")]
    return [processor(), *sorted(f"{file}: {file.read_text()}" for file in files), *sorted(map(str, names))]


def _files_read(cfg: Config, inputs: "Inputs") -> Iterator[Path | str]:
    """Yield the files and picture folders that a run's identity depends on, except the weights of pre-training."""
    from fpn_ablate.data.coco import CocoDataset  # loads torch, as the next
    from fpn_ablate.weights.files import locate

    yield from (path for split in inputs.splits if isinstance(split, CocoDataset) for path in split.files)
    for part in cfg.user_parts.values():  # one that was edited during the run gets no entry
        yield from user_parts.files(part).values()
    if cfg.task.name == "fast_rcnn" and cfg.task.proposals.file:
        yield cfg.task.proposals.file
    weights = cfg.weights if cfg.mode == "evaluate" else cfg.backbone.weights
    if weights == "imagenet":
        import torch
        import torchvision

        url = torchvision.models.get_model_weights(cfg.backbone.name).DEFAULT.url
        yield Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    elif weights not in ("none", "pretrain"):
        path = locate(Path(weights))
        yield from (path, *(sibling for name in (CONFIG, RECORD) if (sibling := path.with_name(name)).exists()))

"""Whether a cell is finished, told in a moment: without torch, and without reading data or weights.

A run that has read everything that a cell depends on, and leaves or finds the cell finished, says so in `skip.json` in its
folder (`remember`): a digest of what was asked, where, and of which code, and a stamp of each file that was read. While all of
these are as they were, the cell is the same one (`known`). Any doubt is left to `run`, which reads all of it again and is sure.
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

from fpn_ablate.config.schema import INCIDENTAL, Config, TimmBackbone
from fpn_ablate.store.layout import REQUIRED, row_folder, run_folder
from fpn_ablate.utils.console import log_line
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.files import UNREADABLE, save_text
from fpn_ablate.utils.hashing import digest
from fpn_ablate.utils.paths import PACKAGE, RECORD
from fpn_ablate.utils.stamps import _stamp, is_recent, stamps_of

if TYPE_CHECKING:
    from fpn_ablate.engine.inputs import Inputs

FILE = "skip.json"
# Of INCIDENTAL what decides nevertheless, once it is known what `auto` means on a machine.
_DECIDING = ("device", "deterministic")
# Devices whose names torch alone knows: GPUs of WSL, of Tegra, of AMD.
_UNKNOWN = ("dxg", "nvhost*", "nvgpu*", "kfd")
# What decides which GPU torch sees, and where it keeps weights that it has downloaded.
_VARIABLES = ("CUDA", "NVIDIA", "TORCH", "PYTORCH", "XDG_CACHE_HOME")


def print_finished(cfg: Config, folder: Path) -> None:
    log_line(f"{cfg.row} seed {cfg.seed}: finished before, {folder}")


def finished_record(cfg: Config) -> dict[str, Any] | None:
    """The record of a cell that is finished for sure, with all its files; None where it is not, or where that is in doubt."""
    with suppress(UserError, *UNREADABLE):
        asked = request_digest(cfg)
        for folder in sorted(row_folder(cfg).glob(f"seed{cfg.seed}-*")) if asked else ():
            if found := _entry_record(folder, asked):
                return found
    return None


def report_if_finished(cfg: Config) -> bool:
    """Whether a cell is finished for sure, which is then printed."""
    found = finished_record(cfg)
    if found:
        print_finished(cfg, run_folder(cfg, found["fingerprint"]))
    return found is not None


def write_skip_entry(cfg: Config, inputs: "Inputs", fingerprint: str, begun: float) -> None:
    """Leave word beside a finished cell for the next time; nothing where a file that was read may have changed since `begun`,
    the time before any was. Raises nothing: it only saves time."""
    with suppress(UserError, *UNREADABLE):
        stamps, asked = stamps_of(_files_read(cfg, inputs)), request_digest(cfg)
        if asked is None or is_recent(stamps, begun):
            return
        if inputs.pretrained:  # made by this run, maybe, and put into its place as a whole: another is another file
            stamps |= stamps_of([inputs.pretrained.path])
        folder = run_folder(cfg, fingerprint)
        kept = {name: (folder / name).stat().st_size for name in (RECORD, *REQUIRED)}
        content = {"asked": asked, "fingerprint": fingerprint, "kept": kept, "read": {p: s for p, (s, _) in stamps.items()}}
        text = json.dumps(content, indent=1) + "\n"
        if not (folder / FILE).is_file() or (folder / FILE).read_text() != text:
            save_text(folder / FILE, text)


def _entry_record(folder: Path, asked: str) -> dict[str, Any] | None:
    """The record in a folder whose word is that `asked` is finished there, if all is still as it says."""
    with suppress(*UNREADABLE):
        left = json.loads((folder / FILE).read_text())
        record = json.loads((folder / RECORD).read_text())
        whole = all((folder / name).stat().st_size == size for name, size in left["kept"].items())
        same = left["asked"] == asked and all(_stamp(path)[0] == stamp for path, stamp in left["read"].items())
        if whole and same and (record["status"], record["fingerprint"]) == ("finished", left["fingerprint"]):
            return record
    return None


def request_digest(cfg: Config) -> str | None:
    """A digest of all that decides what a cell is, beside the content of files; None where torch or timm must be asked."""
    machine = _machine(cfg.device)
    if machine is None or isinstance(cfg.backbone, TimmBackbone):
        return None
    config = cfg.model_dump(mode="json", exclude=set(INCIDENTAL) - set(_DECIDING))
    places = [str(Path(cfg.out).resolve()), str(Path.cwd()), str(Path.home())]  # paths may be relative
    return digest([config, places, machine, _program()])


@lru_cache
def _program() -> list[Any]:
    """The code to the last letter, the packages that say what the default weights are, and what they are told."""
    sha = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        sha.update(path.read_bytes())
    variables = sorted(item for item in os.environ.items() if item[0].startswith(_VARIABLES))
    return [sha.hexdigest(), platform.python_version(), version("torch"), version("torchvision"), variables]


@lru_cache
def _machine(device: str) -> list[str] | None:
    """What torch calls the device by, and whether there is one; None where that cannot be known without torch."""
    if sys.platform != "linux" or any(any(Path("/dev").glob(name)) for name in _UNKNOWN):
        return None
    from fpn_ablate.runs.environment import processor

    if device == "cpu":
        return [processor()]
    driver = Path("/proc/driver/nvidia")
    files = [*driver.glob("version"), *driver.glob("gpus/*/information")]
    # Which of them a container sees, and their parts.
    names = [*Path("/dev").glob("nvidia*"), *driver.glob("capabilities/**/*")]
    return [processor(), *sorted(f"{file}: {file.read_text()}" for file in files), *sorted(map(str, names))]


def _files_read(cfg: Config, inputs: "Inputs") -> Iterator[Path | str]:
    """The files, and the folders of pictures, that a cell's identity is made from; but not the weights of pre-training."""
    from fpn_ablate.data.coco import files_of_sets  # loads torch
    from fpn_ablate.weights.files import locate

    yield from files_of_sets(cfg.data, *inputs.splits)
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
        yield from (path, *(beside for name in ("config.yaml", RECORD) if (beside := path.with_name(name)).exists()))

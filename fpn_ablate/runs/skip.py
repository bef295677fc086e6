"""Skip finished runs without importing torch or reading data and weights.

Each start that ends with a finished run writes `skip.json` into the run's folder (`write_skip_entry`): a digest of the request
(configuration, folders, machine, code, user's parts) and a stamp of each file that was read or written. While none of them
changes, the run is the same (`finished_record`). In any doubt the run is not skipped; `runs.run` then reads everything and
decides.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fpn_ablate.config import user_parts
from fpn_ablate.config.parts import TimmBackbone
from fpn_ablate.config.schema import INCIDENTAL, Config
from fpn_ablate.store import record
from fpn_ablate.store.layout import REQUIRED, row_folder, run_folder
from fpn_ablate.utils.console import log_line
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.files import UNREADABLE, save_text
from fpn_ablate.utils.gpus import gpu_models, visible_gpus
from fpn_ablate.utils.hashing import digest
from fpn_ablate.utils.paths import CONFIG, PACKAGE, RECORD, SKIP
from fpn_ablate.utils.stamps import is_recent, stamp_of, stamps_of

if TYPE_CHECKING:
    from fpn_ablate.engine.inputs import Inputs

# Keys of INCIDENTAL that decide all the same, once a machine gives `auto` its meaning.
_DECIDING = ("device", "deterministic", "threads")
# Environment variables that decide which GPUs torch sees.
_VARIABLES = ("CUDA", "NVIDIA", "HIP", "ROCR")


def print_finished(cfg: Config, folder: Path) -> None:
    """Print that a run was finished before."""
    log_line(f"{cfg.row} seed {cfg.seed}: finished before, {folder}")


def report_if_finished(cfg: Config) -> bool:
    """Return whether a run is certainly finished; if so, print it."""
    content = finished_record(cfg)
    if content:
        print_finished(cfg, run_folder(cfg, content["fingerprint"]))
    return content is not None


def finished_record(cfg: Config) -> dict[str, Any] | None:
    """Return the record of a run that is certainly finished, with all its files; None otherwise."""
    with suppress(UserError, *UNREADABLE):
        request = request_digest(cfg)
        for file in sorted(row_folder(cfg).glob(f"seed{cfg.seed}-*/{SKIP}")):
            entry = json.loads(file.read_text())
            if entry["request"] == request and all(stamp_of(path)[0] == stamp for path, stamp in entry["stamps"].items()):
                content = record.read(file.parent)
                if not _asks_for_gpu(cfg.device) or _has_model(content["environment"]["device"]):
                    return content
    return None


def write_skip_entry(cfg: Config, inputs: "Inputs", fingerprint: str, start: float) -> None:
    """Write the skip entry of a finished run, unless a file may have changed since `start`, the time before any was read.

    Errors are ignored: an entry only saves time.
    """
    if isinstance(cfg.backbone, TimmBackbone):
        return  # only timm knows which weights are its default
    with suppress(UserError, *UNREADABLE):
        stamps, folder = stamps_of(_files_read(cfg, inputs)), run_folder(cfg, fingerprint)
        if is_recent(stamps, start):
            return
        # As new as this run, but written atomically: another content is another file.
        made = [folder / name for name in (RECORD, *REQUIRED)]
        if cfg.backbone.weights == "pretrain" and inputs.pretrained:
            made.append(inputs.pretrained.path)
        stamps |= stamps_of(made)
        content = {"request": request_digest(cfg), "stamps": {path: stamp for path, (stamp, _) in stamps.items()}}
        save_text(folder / SKIP, json.dumps(content, indent=1) + "\n")


def request_digest(cfg: Config) -> str:
    """Hash everything that identifies a run, except the contents of data and weights.

    Raises:
        UserError: a file of a user's part cannot be read.
        OSError: the machine cannot be identified without torch.
    """
    config = cfg.model_dump(mode="json", exclude=set(INCIDENTAL) - set(_DECIDING))
    places = [str(Path(cfg.out).resolve()), str(Path.cwd()), str(Path.home())]  # paths may be relative
    return digest([config, places, _machine(cfg.device), _program(), user_parts.describe(cfg.user_parts)])


def _asks_for_gpu(device: str) -> bool:
    return device == "cuda" or (device == "auto" and bool(visible_gpus()))


def _has_model(name: str) -> bool:
    """Return whether this machine has GPUs of this product name, or none at all, as where jobs are sent from to others."""
    models = gpu_models()
    return not models or any(name.startswith(model) for model in models)  # a part of a GPU has a longer name


def _machine(device: str) -> list[Any]:
    """Identify the machine by its last start, since which it has the same processor.

    A run on a GPU is the same on any machine, and whichever of its GPUs are visible (`_has_model`).
    """
    if _asks_for_gpu(device):
        return ["cuda"]
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    # torch may see a GPU that `visible_gpus` does not: of AMD, or of a virtual machine under Windows.
    chosen = [] if device == "cpu" else sorted(item for item in os.environ.items() if item[0].startswith(_VARIABLES))
    return [boot, chosen]


@lru_cache
def _program() -> list[str]:
    """Hash the code that this process runs, and name the version of what chooses ImageNet weights."""
    code = [path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))]
    return [digest(code), sys.version, version("torchvision")]


def _files_read(cfg: Config, inputs: "Inputs") -> Iterator[Path | str]:
    """Yield the files and folders of files that a run's identity depends on, except pre-trained weights."""
    for split in inputs.splits:
        yield from getattr(split, "files", ())  # generated data have none
    for part in cfg.user_parts.values():  # one that was edited during the run gets no entry
        yield from (file for file, _ in user_parts.sources(part).values())
    if inputs.proposals_digest:
        yield cfg.task.proposals.file
    weights = cfg.weights if cfg.mode == "evaluate" else cfg.backbone.weights
    if weights == "shipped":
        yield inputs.pretrained.path
    elif weights not in ("none", "pretrain", "imagenet"):
        path = Path(weights)  # a file, or the folder of a run
        yield from (path, *(sibling for name in (CONFIG, RECORD) if (sibling := path.with_name(name)).exists()))

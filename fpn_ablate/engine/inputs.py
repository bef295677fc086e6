"""What a cell starts from: a device, both splits of the data, and the weights of the backbone."""

import hashlib
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fpn_ablate.config.schema import Config, Shapes
from fpn_ablate.data import coco, shapes
from fpn_ablate.data.coco import files_of_sets
from fpn_ablate.engine.fixed_proposals import FixedProposals, Splits
from fpn_ablate.engine.pretrain import Pretrained, ensure
from fpn_ablate.structures.batch import DetectionDataset
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.seeding import set_deterministic
from fpn_ablate.utils.stamps import is_recent, stamps_of
from fpn_ablate.weights import backbone, evaluated
from fpn_ablate.weights.evaluated import EvaluatedWeights


@dataclass(frozen=True)
class Inputs:
    """What a cell starts from, and with it the cells that it builds on.

    Attributes:
        weights: of the backbone, in our names; None: random.
        checkpoint: the detector that is evaluated; None where one is trained. `training` is then `validation`.
        proposals: those of the file that task.proposals.file names, with the file's sha256.
    """

    device: torch.device
    training: DetectionDataset
    validation: DetectionDataset
    pretrained: Pretrained | None = None
    weights: dict[str, torch.Tensor] | None = None
    proposals: FixedProposals | None = None
    proposals_digest: str | None = None
    checkpoint: EvaluatedWeights | None = None

    @property
    def splits(self) -> Splits:
        return self.training, self.validation


def prepare(cfg: Config) -> Inputs:
    """Everything that is read or made before training.

    Raises:
        UserError: bad input.
    """
    device = pick_device(cfg)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    set_deterministic(is_deterministic(cfg, device))
    splits = load_data(cfg)
    if isinstance(cfg.data, Shapes):
        _render_ahead(cfg, *splits)
    proposals = load_fixed_proposals(cfg, splits)
    if cfg.mode == "evaluate":
        return Inputs(device, *splits, None, None, *proposals, evaluated.read_evaluated(cfg, splits[1]))
    pretrains = cfg.backbone.weights == "pretrain"
    pretrained = ensure(cfg, world(cfg), Path(cfg.out) / "backbones", device) if pretrains else None
    state = backbone.backbone_weights(cfg, pretrained.path if pretrained else None)
    return Inputs(device, *splits, pretrained, state, *proposals)


def load_data(cfg: Config) -> tuple[DetectionDataset, DetectionDataset]:
    """Training and validation split, or the latter twice where nothing is trained; broken input is refused here."""
    if isinstance(cfg.data, Shapes):
        # Rendering is what costs, so pictures that are not evaluated are not part of the set.
        splits = shapes.load(
            world(cfg), cfg.data.train_images, min(cfg.data.val_images, cfg.recipe.eval_images or cfg.data.val_images)
        )
        return splits[1:] * 2 if cfg.mode == "evaluate" else splits
    return _photographs(cfg)


def _render_ahead(cfg: Config, training: shapes.ShapesDataset, validation: shapes.ShapesDataset) -> None:
    """All pictures, on all cores at once; but a training that is over before it has seen each renders its own."""
    processes = max(cfg.workers, torch.get_num_threads())
    validation.render_all(processes)
    if cfg.recipe.steps * cfg.recipe.batch_size >= len(training):
        training.render_all(processes)


@dataclass(frozen=True)
class _Read:
    """A COCO-format set that was read, by which configuration, and its files at that time."""

    key: tuple[Any, ...]
    files: dict[str, tuple[str, int]]
    splits: tuple[DetectionDataset, DetectionDataset]


_last: list[_Read] = []  # the rows of a sweep read one set: of COCO's size that takes 16 s


def _photographs(cfg: Config) -> tuple[DetectionDataset, DetectionDataset]:
    key, begun = (cfg.mode, cfg.data, coco.root_of(cfg.data).resolve()), time.time()
    with suppress(OSError):
        if _last and _last[0].key == key and stamps_of(_last[0].files) == _last[0].files:
            return _last[0].splits
    _last.clear()
    splits = (coco.load_val(cfg.data),) * 2 if cfg.mode == "evaluate" else coco.load(cfg.data)
    with suppress(OSError):
        files = stamps_of(files_of_sets(cfg, *splits))
        if not is_recent(files, begun):
            _last.append(_Read(key, files, splits))
    return splits


def world(cfg: Config) -> shapes.World:
    """The generated world at the recipe's size. With other data it still serves to pre-train a backbone."""
    side = cfg.recipe.short_side
    if not isinstance(cfg.data, Shapes):
        return shapes.World(height=side, width=side)
    height, width = round(side * max(1, 1 / cfg.data.aspect)), round(side * max(1, cfg.data.aspect))
    numbers = cfg.data.model_dump(exclude={"name", "train_images", "val_images", "aspect"})
    return shapes.World(height=height, width=width, **numbers)


def is_deterministic(cfg: Config, device: torch.device) -> bool:
    """Whether the same seed gives the same bits on this machine."""
    return device.type == "cpu" if cfg.deterministic == "auto" else cfg.deterministic


def pick_device(cfg: Config) -> torch.device:
    if cfg.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: torch sees no GPU; use device=cpu or device=auto")
    return torch.device(cfg.device)


def load_fixed_proposals(cfg: Config, splits: Splits) -> tuple[FixedProposals | None, str | None]:
    """Those of the file that task.proposals.file names, and its sha256; None and None without a file."""
    file = cfg.task.proposals.file if cfg.task.name == "fast_rcnn" else None
    if file is None:
        return None, None
    instead = f"leave task.proposals.file={file} out, and proposals are made"
    found = FixedProposals.load(Path(file), cfg, splits, instead)
    return found, hashlib.sha256(Path(file).read_bytes()).hexdigest()

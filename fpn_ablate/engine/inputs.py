"""What a cell starts from: a device, both splits of the data, and the weights of the backbone."""

import hashlib
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fpn_ablate.config.schema import Coco, Config, Recipe, Shapes, Task
from fpn_ablate.data import coco, shapes
from fpn_ablate.engine.fixed_proposals import FixedProposals, Splits
from fpn_ablate.engine.pretrain import Pretrained, ensure
from fpn_ablate.model.build import build_detector
from fpn_ablate.structures.batch import DetectionDataset
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.seeding import set_deterministic
from fpn_ablate.utils.stamps import is_recent, stamps_of
from fpn_ablate.weights.backbone import backbone_weights
from fpn_ablate.weights.evaluated import EvaluatedWeights, read_evaluated
from fpn_ablate.weights.files import computed_with


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
    device = pick_device(cfg.device)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    set_deterministic(is_deterministic(cfg.deterministic, device))
    splits = load_data(cfg.data, cfg.recipe, cfg.mode)
    if isinstance(cfg.data, Shapes):
        _render_ahead(cfg.recipe, cfg.workers, *splits)
    proposals = load_fixed_proposals(cfg.task, splits, cfg.recipe.eval_images)
    if cfg.mode == "evaluate":
        with torch.device("meta"):
            model = build_detector(cfg, num_classes=len(splits[1].categories))
        weights = read_evaluated(Path(cfg.weights), model, splits[1], computed_with(cfg.model_dump(mode="json")))
        return Inputs(device, *splits, None, None, *proposals, weights)
    pretrained = _pretrain(cfg, device) if cfg.backbone.weights == "pretrain" else None
    state = backbone_weights(cfg.backbone, pretrained.path if pretrained else None)
    return Inputs(device, *splits, pretrained, state, *proposals)


def _pretrain(cfg: Config, device: torch.device) -> Pretrained:
    small = world(cfg.data, cfg.recipe.short_side)
    return ensure(cfg.backbone, cfg.recipe.pretrain, small, Path(cfg.out) / "backbones", device, cfg.workers)


def load_data(data: Shapes | Coco, recipe: Recipe, mode: str) -> tuple[DetectionDataset, DetectionDataset]:
    """Training and validation split, or the latter twice where nothing is trained; broken input is refused here."""
    if isinstance(data, Shapes):
        # Rendering is what costs, so pictures that are not evaluated are not part of the set.
        evaluated = min(data.val_images, recipe.eval_images or data.val_images)
        splits = shapes.load(world(data, recipe.short_side), data.train_images, evaluated)
        return splits[1:] * 2 if mode == "evaluate" else splits
    return _photographs(data, mode)


def _render_ahead(recipe: Recipe, workers: int, training: shapes.ShapesDataset, validation: shapes.ShapesDataset) -> None:
    """Render all pictures on all cores at once; a training that ends before it has seen each of them renders its own."""
    processes = max(workers, torch.get_num_threads())
    validation.render_all(processes)
    if recipe.steps * recipe.batch_size >= len(training):
        training.render_all(processes)


@dataclass(frozen=True)
class _Read:
    """A COCO-format set that was read, by which configuration, and its files at that time."""

    key: tuple[Any, ...]
    files: dict[str, tuple[str, int]]
    splits: tuple[DetectionDataset, DetectionDataset]


_last: list[_Read] = []  # the rows of a sweep read one set: of COCO's size that takes 16 s


def _photographs(data: Coco, mode: str) -> tuple[DetectionDataset, DetectionDataset]:
    key, begun = (mode, data, coco.root_of(data).resolve()), time.time()
    with suppress(OSError):
        if _last and _last[0].key == key and stamps_of(_last[0].files) == _last[0].files:
            return _last[0].splits
    _last.clear()
    splits = (coco.load_val(data),) * 2 if mode == "evaluate" else coco.load(data)
    with suppress(OSError):
        files = stamps_of(path for split in splits for path in split.files)
        if not is_recent(files, begun):
            _last.append(_Read(key, files, splits))
    return splits


def world(data: Shapes | Coco, short_side: int) -> shapes.World:
    """The generated world at the recipe's size. With other data it still serves to pre-train a backbone."""
    if not isinstance(data, Shapes):
        return shapes.World(height=short_side, width=short_side)
    height, width = round(short_side * max(1, 1 / data.aspect)), round(short_side * max(1, data.aspect))
    numbers = data.model_dump(exclude={"name", "train_images", "val_images", "aspect"})
    return shapes.World(height=height, width=width, **numbers)


def is_deterministic(setting: bool | str, device: torch.device) -> bool:
    """Whether the same seed gives the same bits on this machine."""
    return device.type == "cpu" if setting == "auto" else setting


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: torch sees no GPU; use device=cpu or device=auto")
    return torch.device(name)


def load_fixed_proposals(task: Task, splits: Splits, count: int | None) -> tuple[FixedProposals | None, str | None]:
    """Those of the file that task.proposals.file names, and its sha256; None and None without a file."""
    file = task.proposals.file if task.name == "fast_rcnn" else None
    if file is None:
        return None, None
    instead = f"leave task.proposals.file={file} out, and proposals are made"
    found = FixedProposals.load(Path(file), splits, count, instead)
    return found, hashlib.sha256(Path(file).read_bytes()).hexdigest()

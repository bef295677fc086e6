"""Inputs of a run: device, both splits of the data, starting weights."""

import hashlib
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from joblib import cpu_count

from fpn_ablate.config.schema import Coco, Config, Recipe, Shapes
from fpn_ablate.config.tasks import Task
from fpn_ablate.data import coco, shapes
from fpn_ablate.engine.fixed_proposals import FixedProposals
from fpn_ablate.engine.pretrain import Pretrained, Report, load_or_pretrain
from fpn_ablate.model.build import build_detector
from fpn_ablate.model.precision import set_tf32
from fpn_ablate.structures.batch import DetectionDataset, Splits
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.seeding import set_deterministic
from fpn_ablate.utils.stamps import is_recent, stamps_of
from fpn_ablate.utils.threads import default_threads
from fpn_ablate.weights.backbone import backbone_weights
from fpn_ablate.weights.evaluated import EvaluatedWeights, read_evaluated
from fpn_ablate.weights.files import inference_settings
from fpn_ablate.weights.shipped import find_shipped

WORTH_PROCESSES = 100  # generated pictures, which take 3 s


@dataclass(frozen=True)
class Inputs:
    """Inputs of a run, which the runs that it builds on share.

    Attributes:
        weights: of the backbone, in our names; None: random.
        checkpoint: the detector to evaluate; None in training. With a checkpoint, `training` is `validation`.
        proposals, proposals_digest: content and sha256 of the file that task.proposals.file names.
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

    def digests(self, masks: bool) -> tuple[str, str]:
        """Return the digests of both splits for a run that reads their masks, or none, as the RPN of a run with masks."""
        training, validation = ((split.digest if masks else split.box_digest) for split in self.splits)
        return training, validation

    @property
    def trains_on_validation(self) -> bool:
        """Return True if training reads the split that is evaluated: equal content, or the same files."""
        files = [getattr(split, "files", None) for split in self.splits]
        same = self.training.digest == self.validation.digest or (files[0] is not None and files[0] == files[1])
        return self.checkpoint is None and same


def prepare(cfg: Config, wait: bool = True, report: Report = lambda step, loss: None) -> Inputs:
    """Pick the device, and read or make everything that training needs; `report` is called after each step of pre-training.

    Raises:
        UserError: bad input.
        Held: another process pre-trains the backbone, and `wait` is False.
    """
    device = pick_device(cfg.device)
    own = default_threads()  # before another number is set
    torch.set_num_threads(cfg.threads or own)
    deterministic = is_deterministic(cfg.deterministic, device)
    refuse_random_order(cfg, device, deterministic)
    set_deterministic(deterministic, fixed_shapes=isinstance(cfg.data, Shapes))
    set_tf32()
    splits = load_data(cfg.data, cfg.recipe, cfg.mode, cfg.task.masks)
    if isinstance(cfg.data, Shapes):
        _render_ahead(cfg.recipe, cfg.workers, *splits)
    proposals = load_fixed_proposals(cfg.task, splits, cfg.recipe.eval_images)
    if cfg.mode == "evaluate":
        with torch.device("meta"):
            model = build_detector(cfg, num_classes=len(splits[1].categories))
        settings = inference_settings(cfg.model_dump(mode="json"))
        weights = read_evaluated(Path(cfg.weights), model, splits[1], settings, cfg.user_parts)
        return Inputs(device, *splits, None, None, *proposals, weights)
    pretrained = _pretrained(cfg, device, wait, report)
    state = backbone_weights(cfg.backbone, pretrained.path if pretrained else None)
    return Inputs(device, *splits, pretrained, state, *proposals)


def _pretrained(cfg: Config, device: torch.device, wait: bool, report: Report) -> Pretrained | None:
    """Return the pre-trained weights that the backbone starts from: the package's, or those made here; None: others."""
    if cfg.backbone.weights == "shipped":
        return Pretrained(*find_shipped(cfg.backbone.label), 0.0)
    if cfg.backbone.weights != "pretrain":
        return None
    pictures = world(cfg.data, cfg.recipe.short_side)
    folder = Path(cfg.out) / "backbones"
    return load_or_pretrain(cfg.backbone, cfg.recipe.pretrain, pictures, folder, device, cfg.workers, wait=wait, report=report)


def load_data(data: Shapes | Coco, recipe: Recipe, mode: str, masks: bool = False) -> Splits:
    """Load training and validation split, or validation twice if nothing is trained; those of files with `masks` if needed.

    Raises:
        UserError: the data are broken.
    """
    if isinstance(data, Shapes):
        # Rendering is slow, so the set holds only the pictures that are evaluated.
        evaluated = min(data.val_images, recipe.eval_images or data.val_images)
        splits = shapes.load(world(data, recipe.short_side), data.train_images, evaluated)
        return splits[1:] * 2 if mode == "evaluate" else splits
    return _load_coco(data, recipe.eval_images, mode, masks)


def _render_ahead(recipe: Recipe, workers: int, training: shapes.ShapesDataset, validation: shapes.ShapesDataset) -> None:
    """Render pictures on all cores at once, or read them from the disk; training's only if it sees each of them."""
    for split in (validation, training):
        if split is validation or recipe.steps * recipe.batch_size >= len(split):
            # One process renders; other rows that run at once wait for it, so that it may take their cores.
            split.render_all(max(workers, cpu_count() if len(split) >= WORTH_PROCESSES else 1))


# The COCO-format set that was read last, with the stamps of its files: the rows of a sweep share it, and reading takes 16 s.
_cache: dict[tuple[Any, ...], tuple[dict[str, tuple[str, int]], Splits]] = {}


def _load_coco(data: Coco, eval_images: int | None, mode: str, masks: bool) -> Splits:
    """Load both splits, or return the cached ones if no file has changed since."""
    key, start = (mode, data, eval_images, masks, coco.root_of(data).resolve()), time.time()
    if key in _cache:
        stamps, splits = _cache[key]
        with suppress(OSError):  # a file is gone: the loader names it
            if stamps_of(stamps) == stamps:
                return splits
    _cache.clear()
    if mode == "evaluate":
        splits = (coco.load_val(data, eval_images, masks),) * 2
    else:
        splits = coco.load(data, eval_images, masks)
    stamps = stamps_of(path for split in splits for path in split.files)
    if not is_recent(stamps, start):
        _cache[key] = stamps, splits
    return splits


def world(data: Shapes | Coco, short_side: int) -> shapes.World:
    """Return the generated world at the recipe's size. Runs on photographs use it to pre-train a backbone."""
    if not isinstance(data, Shapes):
        return shapes.World(height=short_side, width=short_side)
    height, width = round(short_side * max(1, 1 / data.aspect)), round(short_side * max(1, data.aspect))
    numbers = data.model_dump(exclude={"name", "train_images", "val_images", "aspect"})
    return shapes.World(height=height, width=width, **numbers)


def is_deterministic(setting: bool | str, device: torch.device) -> bool:
    """Decide whether the same seed must give the same bits: `auto` means on a CPU."""
    return device.type == "cpu" if setting == "auto" else setting


def refuse_random_order(cfg: Config, device: torch.device, deterministic: bool) -> None:
    """Refuse a deterministic run with RoIPool on a GPU, whose gradients are added in no fixed order.

    Raises:
        UserError: it says what to set.
    """
    roi = getattr(cfg.task, "roi", None)
    if deterministic and device.type == "cuda" and cfg.mode == "train" and roi and roi.pooling == "pool":
        raise UserError(
            "deterministic=true with task.roi.pooling=pool: on a GPU, RoIPool adds gradients in no fixed order. "
            "Set task.roi.pooling=align for all rows, or deterministic=auto"
        )


def pick_device(name: str) -> torch.device:
    """Return the device; `auto` is a GPU if there is one.

    Raises:
        UserError: device=cuda without a GPU.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: torch sees no GPU; use device=cpu or device=auto")
    return torch.device(name)


def load_fixed_proposals(task: Task, splits: Splits, count: int | None) -> tuple[FixedProposals | None, str | None]:
    """Load the file that task.proposals.file names, and its sha256; (None, None) without a file."""
    file = task.proposals.file if task.name == "fast_rcnn" else None
    if file is None:
        return None, None
    fix = f"leave out task.proposals.file={file} to let an RPN make the proposals"
    return FixedProposals.load(Path(file), splits, count, fix), hashlib.sha256(Path(file).read_bytes()).hexdigest()

"""What each task trains, and what answers at test time: one network, or several that stand on each other.

What another cell has trained already (the RPN whose proposals Fast R-CNN learns from) is that cell's: `sources` names it, and
whoever carries a cell out has its sources carried out before, like any row of a table.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fpn_ablate import record
from fpn_ablate.data.proposals import WithProposals
from fpn_ablate.data.sample import Batch, DetectionDataset
from fpn_ablate.errors import UserError, first_line
from fpn_ablate.files import MODEL, write_atomically
from fpn_ablate.inputs import Inputs
from fpn_ablate.model import build
from fpn_ablate.model.backbone import freeze_batch_norm
from fpn_ablate.model.detector import Detector
from fpn_ablate.model.roi import Detections
from fpn_ablate.model.rpn import Proposals
from fpn_ablate.proposals import FixedProposals
from fpn_ablate.schema import Config, FPNNeck, RPNTask, SingleLevelNeck
from fpn_ablate.train import checkpointed_steps, given, train

SOURCES = "sources"  # the table of cells that only serve others
CHECKPOINT, CHECKPOINT4 = "checkpoint.pt", "checkpoint-4.pt"
STEP3 = "step3.pt"  # what a four-step cell keeps of its third step while it is in its fourth
TEMPORARY = (CHECKPOINT, CHECKPOINT4, STEP3)


@dataclass(frozen=True)
class Cell:
    """What a task is told of the cell that it trains.

    Attributes:
        folder: where checkpoints lie, and in the end the weights.
        sources: folders of the finished cells that `sources` names.
        log: takes the steps done and named values.
    """

    cfg: Config
    inputs: Inputs
    folder: Path
    fingerprint: str
    sources: dict[str, Path]
    log: Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class Supply:
    """What a cell's network learns from beside the data: proposals that stay as they are, and the RPN that made them where
    it is the row's own."""

    fixed: FixedProposals | None = None
    rpn: Detector | None = None


@dataclass(frozen=True)
class Trained:
    """A trained row.

    Attributes:
        model: what is kept as the row's weights.
        validation: the split that `answer` reads, with proposals where these are fixed.
        answer: proposals (task rpn) or detections of a batch.
        whole: `answer` with everything that it takes from pixels on, for the latency; differs where proposals are fixed.
        proposals: where they come from, for the record.
    """

    model: Detector
    validation: DetectionDataset
    answer: Callable[[Batch], Proposals | Detections]
    whole: Callable[[Batch], Proposals | Detections]
    proposals: dict[str, Any] | None = None


def sources(cfg: Config) -> dict[str, Config]:
    """The cells that a cell builds on, by what they are to it."""
    kind, task = _kind(cfg), cfg.task
    if cfg.mode == "evaluate":
        return {}
    if kind == "fast_rcnn" and not task.proposals.file:
        neck = task.proposals.neck
        return {"rpn": _source(cfg, task=RPNTask(name="rpn"), neck=neck, row=_row_of(neck))}
    if kind == "separate":
        return {"rpn": _source(cfg, task=RPNTask(name="rpn"))}
    if kind == "four_step":
        return {"second": _source(cfg, task=task.model_copy(update={"training": "separate"}))}
    return {}


def supplied(cell: Cell) -> Supply:
    """Proposals are made now if no other cell has asked for those of this RPN."""
    inputs = cell.inputs
    if inputs.proposals:
        return Supply(inputs.proposals)
    if "rpn" not in cell.sources:
        return Supply()
    folder = cell.sources["rpn"]
    cfg = cell.cfg.model_copy(update={"neck": sources(cell.cfg)["rpn"].neck})
    rpn, known = _load(cell, cfg, folder, ("rpn",)), record.read(folder) or {}

    def make() -> FixedProposals:
        return FixedProposals.of(rpn, cell.cfg, inputs.splits, inputs.device, known["row"], known["fingerprint"])

    fixed = FixedProposals.kept(folder, make, cell.cfg, inputs.splits)
    return Supply(fixed, rpn if _kind(cell.cfg) == "separate" else None)


def carry_out(cell: Cell, supply: Supply) -> Trained:
    """Train what the task of a cell asks for, or read it."""
    learn = _read if cell.cfg.mode == "evaluate" else _LEARN[_kind(cell.cfg)]
    return _trained(cell, supply, learn(cell, supply))


def restore(cell: Cell, supply: Supply) -> Trained:
    """A finished cell again, from its weights."""
    parts = {"rpn": ("rpn",), "fast_rcnn": ("roi",), "separate": ("roi",)}.get(_kind(cell.cfg), ("rpn", "roi"))
    model = _load(cell, cell.cfg, cell.folder, parts)
    if _kind(cell.cfg) == "four_step":
        _freeze_trunk(model)  # as it was; frozen batch norm rounds otherwise
    return _trained(cell, supply, model)


def logged_steps(folder: Path, cfg: Config) -> int:
    """The last step whose log line a resumed cell keeps; 0 for a new one."""
    before, name = (cfg.recipe.steps, CHECKPOINT4) if (folder / STEP3).exists() else (0, CHECKPOINT)
    return before + checkpointed_steps(folder / name)


def _kind(cfg: Config) -> str:
    return cfg.task.training if cfg.task.name == "faster_rcnn" else cfg.task.name


def _source(cfg: Config, **changes: Any) -> Config:
    """Another cell of the same row; its name does without this one's training, since cells of several may ask for it."""
    row = re.sub(r"\+training=\w+", "", cfg.row)
    return cfg.model_copy(update={"table": SOURCES, "row": row, **changes})


def _row_of(neck: FPNNeck | SingleLevelNeck) -> str:
    """What conf/ablation calls a row with this neck."""
    if isinstance(neck, SingleLevelNeck):
        return neck.level
    name = "bottom_up" if not neck.top_down else "fpn" if neck.lateral else "no_lateral"
    return name if neck.output == "pyramid" else f"{name}+output={neck.output}"


def _read(cell: Cell, supply: Supply) -> Detector:
    """The detector in the file that is evaluated."""
    assert cell.inputs.checkpoint
    model = _fresh(cell, build.PARTS[cell.cfg.task.name])
    model.load_state_dict(cell.inputs.checkpoint.tensors, strict=False)  # but for counters of batches nothing is missing
    return model


def _rpn(cell: Cell, supply: Supply) -> Detector:
    """Table 1."""
    model = _fresh(cell, ("rpn",))
    _fit(cell, model, cell.inputs.training, cell.cfg.recipe.steps)
    return model


def _fast_rcnn(cell: Cell, supply: Supply) -> Detector:
    """Tables 2 and 3, and step 2 of the four: backbone, neck and second stage on proposals that stay as they are."""
    assert supply.fixed
    model = _fresh(cell, ("roi",))
    _fit(cell, model, _to_train(cell, supply.fixed), cell.cfg.recipe.box.steps)
    return model


def _joint(cell: Cell, supply: Supply) -> Detector:
    """RPN and second stage of one network, trained end to end."""
    model = _fresh(cell, ("rpn", "roi"))
    _fit(cell, model, cell.inputs.training, cell.cfg.recipe.box.steps)
    return model


def _four_step(cell: Cell, supply: Supply) -> Detector:
    """Table 5, features shared by Faster R-CNN's alternating training (Ren et al. 2015, Sec. 3.2).

    (1) An RPN, (2) Fast R-CNN on its proposals, both as in `separate`; (3) a new RPN head, (4) the second stage again, both on
    the backbone and the neck of (2), which stay as they are.
    """
    cfg, kept = cell.cfg, cell.folder / STEP3
    second = _load(cell, cfg, cell.sources["second"], ("roi",))
    _freeze_trunk(second)
    third = _on_trunk(_fresh(cell, ("rpn",)), second)
    if not kept.exists():
        _fit(cell, third, cell.inputs.training, cfg.recipe.steps)
        write_atomically(kept, lambda temporary: torch.save(third.state_dict(), temporary))
    third.load_state_dict(torch.load(kept, weights_only=True, map_location="cpu"))
    fixed = FixedProposals.of(third, cfg, cell.inputs.splits, cell.inputs.device, cfg.row, cell.fingerprint)
    fourth = _fresh(cell, ("roi",))
    fourth.load_state_dict(second.state_dict())
    fourth = _on_trunk(fourth, second)
    _fit(cell, fourth, _to_train(cell, fixed), cfg.recipe.box.steps, CHECKPOINT4, before=cfg.recipe.steps)
    return Detector(fourth.backbone, fourth.neck, third.rpn, fourth.roi)


_LEARN: dict[str, Callable[[Cell, Supply], Detector]] = {
    "rpn": _rpn,
    "fast_rcnn": _fast_rcnn,
    "separate": _fast_rcnn,  # the row's own RPN is a network of its own
    "joint": _joint,
    "four_step": _four_step,
}


def _trained(cell: Cell, supply: Supply, model: Detector) -> Trained:
    model.eval()
    validation, fixed, rpn = cell.inputs.validation, supply.fixed, supply.rpn

    def answer(batch: Batch) -> Proposals | Detections:
        if model.roi is None:
            return model.propose(batch.images, batch.sizes)
        return model.detect(batch.images, batch.sizes, given(batch))

    def whole(batch: Batch) -> Proposals | Detections:
        return model.detect(batch.images, batch.sizes, rpn.propose(batch.images, batch.sizes)) if rpn else answer(batch)

    if fixed is None:
        own = {"row": cell.cfg.row, "fingerprint": cell.fingerprint} if model.roi else None
        return Trained(model, validation, answer, whole, own)
    validation = WithProposals(validation, fixed.val_ids, fixed.val_boxes, cell.cfg.task.roi.proposals[1])
    return Trained(model, validation, answer, whole, {"row": fixed.row, "fingerprint": fixed.fingerprint})


def _to_train(cell: Cell, fixed: FixedProposals) -> WithProposals:
    return WithProposals(cell.inputs.training, fixed.train_ids, fixed.train_boxes, cell.cfg.task.roi.proposals[0])


def _fresh(cell: Cell, parts: tuple[str, ...], cfg: Config | None = None) -> Detector:
    """A network of the row (or of `cfg`) with its starting weights, on the cell's device."""
    cfg = cfg or cell.cfg
    model = build.build_detector(cfg, num_classes=len(cell.inputs.training.categories), parts=parts)
    build.initialise(model, cfg.seed)
    if cell.inputs.weights is not None:
        build.load_backbone(model, cell.inputs.weights)
    return model.to(cell.inputs.device, memory_format=torch.channels_last)  # a quarter less time a step, on a CPU as well


def _load(cell: Cell, cfg: Config, folder: Path, parts: tuple[str, ...]) -> Detector:
    """The network of a finished cell."""
    model = _fresh(cell, parts, cfg)
    try:
        model.load_state_dict(torch.load(folder / MODEL, weights_only=True, map_location="cpu"))
    except Exception as error:  # torch raises many kinds for a file that is not one of its own
        reason = first_line(error)
        raise UserError(f"{folder / MODEL}: cannot be read ({reason}); remove its folder, and it is made anew") from None
    return model.eval()


def _freeze_trunk(model: Detector) -> None:
    """Backbone and neck are no longer trained, batch statistics included."""
    for part in (model.backbone, model.neck):
        freeze_batch_norm(part).requires_grad_(False)


def _on_trunk(model: Detector, other: Detector) -> Detector:
    """The heads of `model` on the backbone and the neck of `other`."""
    model.backbone, model.neck = other.backbone, other.neck
    return model


def _fit(
    cell: Cell, model: nn.Module, dataset: DetectionDataset, steps: int, checkpoint: str = CHECKPOINT, before: int = 0
) -> None:
    """Train from the cell's checkpoint on; `before`: steps of earlier stages of the cell, for the log."""
    train(
        model,
        dataset,
        cell.cfg,
        cell.inputs.device,
        steps,
        cell.folder / checkpoint,
        lambda step, values: cell.log(before + step, values),
    )

"""What each task trains, and what answers at test time: one network, or several that stand on each other.

Every function takes a `Cell` and returns a `Trained`. A network that another cell has trained already (the RPN whose proposals
Fast R-CNN learns from) is that cell's: `Cell.finished` finds it or carries it out, like any row of a table.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fpn_ablate import record
from fpn_ablate.data.proposals import WithProposals
from fpn_ablate.data.sample import Batch, DetectionDataset
from fpn_ablate.model import build
from fpn_ablate.model.backbone import freeze_batch_norm
from fpn_ablate.model.detector import Detector
from fpn_ablate.model.roi import Detections
from fpn_ablate.model.rpn import Proposals
from fpn_ablate.proposals import FixedProposals
from fpn_ablate.schema import Config, RPNTask
from fpn_ablate.train import given, train

if TYPE_CHECKING:
    from fpn_ablate.run import Cell

SOURCES = "sources"  # the table of cells that only serve others
STEP3 = "step3.pt"  # what a four-step cell keeps of its third step while it is in its fourth


@dataclass
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


def carry_out(cell: "Cell") -> Trained:
    """Train what the task of a cell asks for."""
    task = cell.cfg.task
    if task.name == "rpn":
        return _rpn(cell)
    if task.name == "fast_rcnn":
        return _fast_rcnn(cell, _fixed(cell))
    if task.training == "joint":
        return _joint(cell)
    if task.training == "four_step":
        return _four_step(cell)
    return _separate(cell)


def _rpn(cell: "Cell") -> Trained:
    """Table 1."""
    model = _fresh(cell, ("rpn",))
    _fit(cell, model, cell.inputs.training, cell.cfg.recipe.steps)

    def answer(batch: Batch) -> Proposals:
        return model.propose(batch.images, batch.sizes)

    return Trained(model, cell.inputs.validation, answer, answer)


def _fast_rcnn(cell: "Cell", fixed: FixedProposals) -> Trained:
    """Table 2, and step 2 of the four: backbone, neck and second stage on proposals that stay as they are."""
    model = _fresh(cell, ("roi",))
    training, validation = _with_proposals(cell, fixed)
    _fit(cell, model, training, cell.cfg.recipe.box.steps)

    def answer(batch: Batch) -> Detections:
        return model.detect(batch.images, batch.sizes, given(batch))

    return Trained(model, validation, answer, answer, {"row": fixed.row, "fingerprint": fixed.fingerprint})


def _separate(cell: "Cell") -> Trained:
    """Table 3: the row's own RPN is a network of its own, and Fast R-CNN learns from its proposals."""
    own = _rpn_cell(cell.cfg)
    trained = _fast_rcnn(cell, _proposals_of(cell, own))
    model, rpn = trained.model, _load(cell, own, ("rpn",))
    trained.whole = lambda batch: model.detect(batch.images, batch.sizes, rpn.propose(batch.images, batch.sizes))
    return trained


def _joint(cell: "Cell") -> Trained:
    """RPN and second stage of one network, trained end to end."""
    model = _fresh(cell, ("rpn", "roi"))
    _fit(cell, model, cell.inputs.training, cell.cfg.recipe.box.steps)
    return _own_proposals(cell, model)


def _four_step(cell: "Cell") -> Trained:
    """Table 5, features shared by Faster R-CNN's alternating training (Ren et al. 2015, Sec. 3.2).

    (1) An RPN, (2) Fast R-CNN on its proposals, both as in `separate`; (3) a new RPN head, (4) the second stage again, both on
    the backbone and the neck of (2), which stay as they are.
    """
    cfg, folder = cell.cfg, cell.folder
    second = _load(cell, _source(cfg, task=cfg.task.model_copy(update={"training": "separate"})), ("roi",))
    third, kept = _share(_fresh(cell, ("rpn",)), second), folder / STEP3
    if not kept.exists():
        _fit(cell, third, cell.inputs.training, cfg.recipe.steps)
        record.write_atomically(kept, lambda temporary: torch.save(third.state_dict(), temporary))
        (folder / "checkpoint.pt").unlink(missing_ok=True)
    third.load_state_dict(torch.load(kept, weights_only=True, map_location="cpu"))
    fixed = FixedProposals.of(third, cell, cfg.row, cell.fingerprint)
    fourth = _share(_load_into(_fresh(cell, ("roi",)), second.state_dict()), second)
    _fit(cell, fourth, _with_proposals(cell, fixed)[0], cfg.recipe.box.steps, before=cfg.recipe.steps)
    return _own_proposals(cell, Detector(fourth.backbone, fourth.neck, third.rpn, fourth.roi))


def _own_proposals(cell: "Cell", model: Detector) -> Trained:
    def answer(batch: Batch) -> Detections:
        return model.detect(batch.images, batch.sizes)

    return Trained(model, cell.inputs.validation, answer, answer, {"row": cell.cfg.row, "fingerprint": cell.fingerprint})


def _fixed(cell: "Cell") -> FixedProposals:
    """The proposals that all rows of Table 2 share."""
    source = cell.cfg.task.proposals
    if source.file:
        return FixedProposals.load(Path(source.file), cell)
    return _proposals_of(cell, _rpn_cell(cell.cfg, neck=source.neck, row=source.row))


def _proposals_of(cell: "Cell", cfg: Config) -> FixedProposals:
    """The proposals of the RPN that the cell `cfg` trains."""
    folder = cell.finished(cfg)
    fingerprint = str(record.read(folder)["fingerprint"])
    return FixedProposals.kept(folder, lambda: FixedProposals.of(_load(cell, cfg, ("rpn",)), cell, cfg.row, fingerprint), cell)


def _rpn_cell(cfg: Config, **changes: Any) -> Config:
    return _source(cfg, task=RPNTask(name="rpn"), **changes)


def _source(cfg: Config, **changes: Any) -> Config:
    """Another cell of the same row; its name does without this one's training, since cells of several may ask for it."""
    row = re.sub(r"\+training=\w+", "", cfg.row)
    return cfg.model_copy(update={"table": SOURCES, "row": row, **changes})


def _with_proposals(cell: "Cell", fixed: FixedProposals) -> tuple[WithProposals, WithProposals]:
    """Training and validation split with as many of the best proposals as the task uses."""
    most = cell.cfg.task.roi.proposals
    return (
        WithProposals(cell.inputs.training, fixed.train_ids, fixed.train_boxes, most[0]),
        WithProposals(cell.inputs.validation, fixed.val_ids, fixed.val_boxes, most[1]),
    )


def _fresh(cell: "Cell", parts: tuple[str, ...], cfg: Config | None = None) -> Detector:
    """A network of the row (or of `cfg`) with its starting weights, on the cell's device."""
    cfg = cfg or cell.cfg
    model = build.build_detector(cfg, num_classes=len(cell.inputs.training.categories), parts=parts)
    build.initialise(model, cfg.seed)
    if cell.inputs.weights is not None:
        build.load_backbone(model, cell.inputs.weights)
    return model.to(cell.inputs.device, memory_format=torch.channels_last)  # a quarter less time a step, on a CPU as well


def _load(cell: "Cell", cfg: Config, parts: tuple[str, ...]) -> Detector:
    """The network of another cell, which is carried out now if it has not been."""
    state = torch.load(cell.finished(cfg) / "model.pt", weights_only=True, map_location="cpu")
    return _load_into(_fresh(cell, parts, cfg), state).eval()


def _load_into(model: Detector, state: dict[str, torch.Tensor]) -> Detector:
    model.load_state_dict(state)
    return model


def _share(model: Detector, other: Detector) -> Detector:
    """`model` with the backbone and the neck of `other`, which are no longer trained, batch statistics included."""
    for part in (other.backbone, other.neck):
        freeze_batch_norm(part).requires_grad_(False)
    model.backbone, model.neck = other.backbone, other.neck
    return model


def _fit(cell: "Cell", model: nn.Module, dataset: DetectionDataset, steps: int, before: int = 0) -> None:
    """Train from the cell's checkpoint on; `before`: steps of earlier stages of the cell, for the log."""
    train(
        model,
        dataset,
        cell.cfg,
        cell.inputs.device,
        steps,
        cell.folder / "checkpoint.pt",
        lambda step, values: cell.log(before + step, values),
    )

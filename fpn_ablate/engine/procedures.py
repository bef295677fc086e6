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

from fpn_ablate.config.schema import Config, FPNNeck, RPNTask, SingleLevelNeck
from fpn_ablate.data.proposals import WithProposals
from fpn_ablate.engine.fixed_proposals import FixedProposals
from fpn_ablate.engine.inputs import Inputs
from fpn_ablate.engine.train import batch_proposals, checkpointed_steps, train
from fpn_ablate.model import build, init
from fpn_ablate.model.backbones.batch_norm import freeze_batch_norm
from fpn_ablate.model.detectors.two_stage import Detector
from fpn_ablate.store import record
from fpn_ablate.structures.batch import Batch, DetectionDataset
from fpn_ablate.structures.instances import BatchDetections, Proposals
from fpn_ablate.utils.errors import UserError, first_line
from fpn_ablate.utils.files import write_atomically
from fpn_ablate.utils.paths import MODEL
from fpn_ablate.weights import backbone

SOURCES = "sources"  # the table of cells that only serve others
CHECKPOINT, CHECKPOINT4 = "checkpoint.pt", "checkpoint-4.pt"
STEP3 = "step3.pt"  # what a four-step cell keeps of its third step while it is in its fourth
TEMPORARY = (CHECKPOINT, CHECKPOINT4, STEP3)


@dataclass(frozen=True)
class RunContext:
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
class ProposalSupply:
    """What a cell's network learns from beside the data: proposals that stay as they are, and the RPN that made them where
    it is the row's own."""

    fixed: FixedProposals | None = None
    rpn: Detector | None = None


@dataclass(frozen=True)
class Trained:
    """A trained row.

    Attributes:
        model: what is kept as the row's weights.
        validation: the split that `predict` reads, with proposals where these are fixed.
        predict: proposals (task rpn) or detections of a batch.
        predict_end_to_end: `predict` with everything that it takes from pixels on, for the latency; differs where proposals
            are fixed.
        proposals: where they come from, for the record.
    """

    model: Detector
    validation: DetectionDataset
    predict: Callable[[Batch], Proposals | BatchDetections]
    predict_end_to_end: Callable[[Batch], Proposals | BatchDetections]
    proposals: dict[str, Any] | None = None


def sources(cfg: Config) -> dict[str, Config]:
    """The cells that a cell builds on, by what they are to it."""
    kind, task = _procedure_of(cfg), cfg.task
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


def prepare_proposals(context: RunContext) -> ProposalSupply:
    """Proposals are made now if no other cell has asked for those of this RPN."""
    inputs = context.inputs
    if inputs.proposals:
        return ProposalSupply(inputs.proposals)
    if "rpn" not in context.sources:
        return ProposalSupply()
    folder = context.sources["rpn"]
    cfg = context.cfg.model_copy(update={"neck": sources(context.cfg)["rpn"].neck})
    rpn, known = _load(context, cfg, folder, ("rpn",)), record.read(folder) or {}

    def make() -> FixedProposals:
        return _propose(context, rpn, known["row"], known["fingerprint"])

    fixed = FixedProposals.kept(folder, make, inputs.splits, context.cfg.recipe.eval_images)
    return ProposalSupply(fixed, rpn if _procedure_of(context.cfg) == "separate" else None)


def train_or_load(context: RunContext, supply: ProposalSupply) -> Trained:
    """Train what the task of a cell asks for, or read it."""
    learn = _evaluated if context.cfg.mode == "evaluate" else _PROCEDURES[_procedure_of(context.cfg)]
    return _as_trained(context, supply, learn(context, supply))


def restore(context: RunContext, supply: ProposalSupply) -> Trained:
    """A finished cell again, from its weights."""
    parts = {"rpn": ("rpn",), "fast_rcnn": ("roi",), "separate": ("roi",)}.get(_procedure_of(context.cfg), ("rpn", "roi"))
    model = _load(context, context.cfg, context.folder, parts)
    if _procedure_of(context.cfg) == "four_step":
        _freeze_trunk(model)  # as it was; frozen batch norm rounds otherwise
    return _as_trained(context, supply, model)


def logged_steps(folder: Path, cfg: Config) -> int:
    """The last step whose log line a resumed cell keeps; 0 for a new one."""
    before, name = (cfg.recipe.steps, CHECKPOINT4) if (folder / STEP3).exists() else (0, CHECKPOINT)
    return before + checkpointed_steps(folder / name)


def _procedure_of(cfg: Config) -> str:
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


def _evaluated(context: RunContext, supply: ProposalSupply) -> Detector:
    """The detector in the file that is evaluated."""
    assert context.inputs.checkpoint
    model = _build_initialised(context, build.PARTS[context.cfg.task.name])
    model.load_state_dict(context.inputs.checkpoint.tensors, strict=False)  # but for counters of batches nothing is missing
    return model


def _rpn(context: RunContext, supply: ProposalSupply) -> Detector:
    """Table 1."""
    model = _build_initialised(context, ("rpn",))
    _train(context, model, context.inputs.training, context.cfg.recipe.steps)
    return model


def _fast_rcnn(context: RunContext, supply: ProposalSupply) -> Detector:
    """Tables 2 and 3, and step 2 of the four: backbone, neck and second stage on proposals that stay as they are."""
    assert supply.fixed
    model = _build_initialised(context, ("roi",))
    _train(context, model, _with_train_proposals(context, supply.fixed), context.cfg.recipe.roi.steps)
    return model


def _joint(context: RunContext, supply: ProposalSupply) -> Detector:
    """RPN and second stage of one network, trained end to end."""
    model = _build_initialised(context, ("rpn", "roi"))
    _train(context, model, context.inputs.training, context.cfg.recipe.roi.steps)
    return model


def _four_step(context: RunContext, supply: ProposalSupply) -> Detector:
    """Table 5, features shared by Faster R-CNN's alternating training (Ren et al. 2015, Sec. 3.2).

    (1) An RPN, (2) Fast R-CNN on its proposals, both as in `separate`; (3) a new RPN head, (4) the second stage again, both on
    the backbone and the neck of (2), which stay as they are.
    """
    cfg, kept = context.cfg, context.folder / STEP3
    second = _load(context, cfg, context.sources["second"], ("roi",))
    _freeze_trunk(second)
    third = _share_trunk(_build_initialised(context, ("rpn",)), second)
    if not kept.exists():
        _train(context, third, context.inputs.training, cfg.recipe.steps)
        write_atomically(kept, lambda temporary: torch.save(third.state_dict(), temporary))
    third.load_state_dict(torch.load(kept, weights_only=True, map_location="cpu"))
    fixed = _propose(context, third, cfg.row, context.fingerprint)
    fourth = _build_initialised(context, ("roi",))
    fourth.load_state_dict(second.state_dict())
    fourth = _share_trunk(fourth, second)
    _train(context, fourth, _with_train_proposals(context, fixed), cfg.recipe.roi.steps, CHECKPOINT4, before=cfg.recipe.steps)
    return Detector(fourth.backbone, fourth.neck, third.rpn, fourth.roi)


_PROCEDURES: dict[str, Callable[[RunContext, ProposalSupply], Detector]] = {
    "rpn": _rpn,
    "fast_rcnn": _fast_rcnn,
    "separate": _fast_rcnn,  # the row's own RPN is a network of its own
    "joint": _joint,
    "four_step": _four_step,
}


def _as_trained(context: RunContext, supply: ProposalSupply, model: Detector) -> Trained:
    model.eval()
    validation, fixed, rpn = context.inputs.validation, supply.fixed, supply.rpn

    def predict(batch: Batch) -> Proposals | BatchDetections:
        if model.roi is None:
            return model.propose(batch.images, batch.sizes)
        return model.detect(batch.images, batch.sizes, batch_proposals(batch))

    def predict_end_to_end(batch: Batch) -> Proposals | BatchDetections:
        return model.detect(batch.images, batch.sizes, rpn.propose(batch.images, batch.sizes)) if rpn else predict(batch)

    if fixed is None:
        own = {"row": context.cfg.row, "fingerprint": context.fingerprint} if model.roi else None
        return Trained(model, validation, predict, predict_end_to_end, own)
    validation = WithProposals(validation, fixed.val_ids, fixed.val_boxes, context.cfg.task.roi.proposals[1])
    return Trained(model, validation, predict, predict_end_to_end, {"row": fixed.row, "fingerprint": fixed.fingerprint})


def _with_train_proposals(context: RunContext, fixed: FixedProposals) -> WithProposals:
    return WithProposals(context.inputs.training, fixed.train_ids, fixed.train_boxes, context.cfg.task.roi.proposals[0])


def _build_initialised(context: RunContext, parts: tuple[str, ...], cfg: Config | None = None) -> Detector:
    """A network of the row (or of `cfg`) with its starting weights, on the cell's device."""
    cfg = cfg or context.cfg
    model = build.build_detector(cfg, num_classes=len(context.inputs.training.categories), parts=parts)
    init.initialise(model, cfg.seed)
    if context.inputs.weights is not None:
        backbone.load_backbone(model, context.inputs.weights)
    return model.to(context.inputs.device, memory_format=torch.channels_last)  # a quarter less time a step, on a CPU as well


def _load(context: RunContext, cfg: Config, folder: Path, parts: tuple[str, ...]) -> Detector:
    """The network of a finished cell."""
    model = _build_initialised(context, parts, cfg)
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


def _share_trunk(model: Detector, other: Detector) -> Detector:
    """The heads of `model` on the backbone and the neck of `other`."""
    model.backbone, model.neck = other.backbone, other.neck
    return model


def _propose(context: RunContext, rpn: Detector, row: str, fingerprint: str) -> FixedProposals:
    """Propose on both splits; `row` and `fingerprint` are those of the run that trained `rpn`."""
    inputs, cfg = context.inputs, context.cfg
    return FixedProposals.of(rpn, inputs.splits, cfg.recipe, inputs.device, row, fingerprint, cfg.workers)


def _train(
    context: RunContext, model: nn.Module, dataset: DetectionDataset, steps: int, checkpoint: str = CHECKPOINT, before: int = 0
) -> None:
    """Train, from the run's checkpoint if there is one; `before`: steps of its earlier stages, for the log."""
    cfg = context.cfg
    train(
        model,
        dataset,
        cfg.recipe,
        context.inputs.device,
        seed=cfg.seed,
        steps=steps,
        workers=cfg.workers,
        checkpoint=context.folder / checkpoint,
        log_every=cfg.log.every,
        report=lambda step, values: context.log(before + step, values),
    )

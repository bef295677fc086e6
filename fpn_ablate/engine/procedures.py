"""Training procedures: rpn, fast_rcnn, separate, joint, four_step, segment_proposals, dense.

Each trains one network, or several that build on each other.

A run does not train again what another run trains (the RPN whose proposals Fast R-CNN learns from): `config.sources` names
those runs, and `runs.run` finishes them first, as it does any row of a table.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fpn_ablate.config.schema import Config
from fpn_ablate.config.sources import sources
from fpn_ablate.data.proposals import WithProposals
from fpn_ablate.engine.distributed import ALONE, Ranks
from fpn_ablate.engine.fixed_proposals import FixedProposals
from fpn_ablate.engine.inputs import Inputs
from fpn_ablate.engine.train import batch_proposals, checkpointed_steps, place, read_checkpoint, train
from fpn_ablate.model import build, init
from fpn_ablate.model.backbones.batch_norm import freeze_batch_norm
from fpn_ablate.model.detectors.two_stage import Detector
from fpn_ablate.model.optimise import optimise
from fpn_ablate.store import record
from fpn_ablate.structures.batch import Batch, DetectionDataset
from fpn_ablate.structures.instances import BatchDetections, Proposals
from fpn_ablate.utils.errors import UserError, first_line
from fpn_ablate.utils.files import write_atomically
from fpn_ablate.utils.paths import MODEL
from fpn_ablate.weights import backbone
from fpn_ablate.weights.files import load_torch

CHECKPOINT, CHECKPOINT4 = "checkpoint.pt", "checkpoint-4.pt"
STEP3 = "step3.pt"  # weights of step 3, which a four-step run keeps during step 4
RESUME_FILES = (CHECKPOINT, CHECKPOINT4, STEP3)


@dataclass(frozen=True)
class RunContext:
    """The run that a procedure trains.

    Attributes:
        folder: of checkpoints and, at the end, of the weights.
        sources: folders of the finished runs that `sources` names.
        log: takes the steps done and named values.
        wait: for proposals that another process makes; otherwise `Held` is raised.
        ranks: processes that share the work; each has a context, and rank 0 alone writes.
        advance: called after each part of a training step.
    """

    cfg: Config
    inputs: Inputs
    folder: Path
    fingerprint: str
    sources: dict[str, Path]
    log: Callable[[int, dict[str, float]], None]
    wait: bool = True
    ranks: Ranks = ALONE
    advance: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class ProposalSupply:
    """Proposals that a network learns from: fixed ones, and the RPN that made them if it is the row's own."""

    fixed: FixedProposals | None = None
    rpn: Detector | None = None


@dataclass(frozen=True)
class Trained:
    """A trained row.

    Attributes:
        model: saved as the row's weights.
        validation: the split that `predict` reads; its samples carry the fixed proposals, if there are any.
        predict: batch -> proposals (tasks rpn and segment_proposals) or detections.
        propose: batch -> proposals, where their recall is evaluated beside the detections (task.proposal_recall).
        predict_end_to_end: as `predict`; if the fixed proposals are of the row's own RPN, that RPN runs too (for the latency).
        proposals: row and fingerprint of the run whose RPN makes the proposals, for the record.
        mask_threshold: probability above which a pixel belongs to a mask.
    """

    model: Detector
    validation: DetectionDataset
    predict: Callable[[Batch], Proposals | BatchDetections]
    predict_end_to_end: Callable[[Batch], Proposals | BatchDetections]
    proposals: dict[str, Any] | None = None
    mask_threshold: float = 0.5
    propose: Callable[[Batch], Proposals] | None = None


def prepare_proposals(context: RunContext) -> ProposalSupply:
    """Return the proposals that a run learns from, made by its source's RPN unless another run has cached them."""
    inputs = context.inputs
    if inputs.proposals:
        return ProposalSupply(inputs.proposals)
    if "rpn" not in context.sources:
        return ProposalSupply()
    folder = context.sources["rpn"]
    cfg = sources(context.cfg)["rpn"]
    rpn, source = _load(context, cfg, folder, ("rpn",)), record.read(folder) or {}

    def make() -> FixedProposals:
        return _propose(context, rpn, source["row"], source["fingerprint"])

    count = context.cfg.recipe.eval_images
    fixed = FixedProposals.cached(folder, make, inputs.splits, count, context.wait, context.ranks)
    return ProposalSupply(fixed, rpn if context.cfg.procedure == "separate" else None)


def train_or_load(context: RunContext, supply: ProposalSupply) -> Trained:
    """Train by the procedure of the run's task, or load the weights that the run tests."""
    if context.cfg.mode == "evaluate":
        model = _load_evaluated(context)
    elif "without_pyramid" in context.sources:
        model = _load_finished(context, context.sources["without_pyramid"])
    else:
        model = _PROCEDURES[context.cfg.procedure](context, supply)
    return _as_trained(context, supply, model)


def restore(context: RunContext, supply: ProposalSupply) -> Trained:
    """Load a finished run from its weights."""
    return _as_trained(context, supply, _load_finished(context, context.folder))


def logged_steps(folder: Path, cfg: Config) -> int:
    """Return the last step whose log lines a resumed run keeps; 0 for a new run."""
    before, name = (cfg.recipe.steps, CHECKPOINT4) if (folder / STEP3).exists() else (0, CHECKPOINT)
    return before + checkpointed_steps(folder / name)


def _load_finished(context: RunContext, folder: Path) -> Detector:
    """Load the row's network from a finished run."""
    heads = ("roi",) if context.cfg.procedure == "separate" else build.HEADS[context.cfg.task.name]
    model = _load(context, context.cfg, folder, heads)
    if context.cfg.procedure == "four_step":
        _freeze_trunk(model)  # as in training: frozen batch norm rounds differently
    return model


def _load_evaluated(context: RunContext) -> Detector:
    """Load the detector of the file that is evaluated."""
    assert context.inputs.checkpoint
    model = _build_initialised(context, build.HEADS[context.cfg.task.name])
    model.load_state_dict(context.inputs.checkpoint.tensors, strict=False)  # only batch counters are missing
    return model


def _train_rpn(context: RunContext, supply: ProposalSupply) -> Detector:
    """Train backbone, neck and RPN (Table 1)."""
    model = _build_initialised(context, ("rpn",))
    _train(context, model, context.inputs.training, context.cfg.recipe.steps)
    return model


def _train_segments(context: RunContext, supply: ProposalSupply) -> Detector:
    """Train backbone, neck and segment head (Table 6)."""
    model = _build_initialised(context, build.HEADS["segment_proposals"])
    _train(context, model, context.inputs.training, context.cfg.steps)
    return model


def _train_dense(context: RunContext, supply: ProposalSupply) -> Detector:
    """Train a detector of one stage."""
    model = _build_initialised(context, build.HEADS[context.cfg.task.name])
    _train(context, model, context.inputs.training, context.cfg.steps)
    return model


def _train_fast_rcnn(context: RunContext, supply: ProposalSupply) -> Detector:
    """Train backbone, neck and second stage on fixed proposals (Tables 2 and 3, and step 2 of the four)."""
    assert supply.fixed
    model = _build_initialised(context, ("roi",))
    _train(context, model, _with_train_proposals(context, supply.fixed), context.cfg.recipe.roi.steps)
    return model


def _train_joint(context: RunContext, supply: ProposalSupply) -> Detector:
    """Train RPN and second stage of one network end to end."""
    model = _build_initialised(context, ("rpn", "roi"))
    _train(context, model, context.inputs.training, context.cfg.recipe.roi.steps)
    return model


def _train_four_step(context: RunContext, supply: ProposalSupply) -> Detector:
    """Share features by Faster R-CNN's alternating training (Ren et al. 2015, Sec. 3.2; Table 5).

    (1) Train an RPN, (2) Fast R-CNN on its proposals, both as in `separate`; then, on the frozen backbone and neck of (2),
    (3) a new RPN head and (4) the second stage again.
    """
    cfg, step3 = context.cfg, context.folder / STEP3
    second = _load(context, cfg, context.sources["second"], ("roi",))
    _freeze_trunk(second)
    third = _share_trunk(_build_initialised(context, ("rpn",)), second)
    if context.ranks.broadcast(not step3.exists()):
        _train(context, third, context.inputs.training, cfg.recipe.steps)
        if context.ranks.first:
            write_atomically(step3, lambda temporary: torch.save(third.state_dict(), temporary))
        context.ranks.exchange()  # now it is written
    third.load_state_dict(read_checkpoint(step3))
    fixed = _propose(context, third, cfg.row, context.fingerprint)
    fourth = _build_initialised(context, ("roi",))
    fourth.load_state_dict(second.state_dict())
    fourth = _share_trunk(fourth, second)
    _train(context, fourth, _with_train_proposals(context, fixed), cfg.recipe.roi.steps, CHECKPOINT4, before=cfg.recipe.steps)
    model = _share_trunk(_build_initialised(context, ("rpn", "roi")), fourth)
    model.rpn, model.roi = third.rpn, fourth.roi
    return model


_PROCEDURES: dict[str, Callable[[RunContext, ProposalSupply], Detector]] = {
    "rpn": _train_rpn,
    "segment_proposals": _train_segments,
    "fast_rcnn": _train_fast_rcnn,
    "separate": _train_fast_rcnn,  # the row's RPN is a separate network
    "joint": _train_joint,
    "four_step": _train_four_step,
    "dense": _train_dense,
}


def _as_trained(context: RunContext, supply: ProposalSupply, model: Detector) -> Trained:
    """Set the model to evaluation, and say how it predicts with and without fixed proposals."""
    model.eval()
    validation, fixed, rpn = context.inputs.validation, supply.fixed, supply.rpn

    def propose(batch: Batch) -> Proposals:
        return model.propose(batch.images, batch.sizes)

    def predict(batch: Batch) -> Proposals | BatchDetections:
        if not model.detects:
            return propose(batch)
        return model.detect(batch.images, batch.sizes, batch_proposals(batch))

    def predict_end_to_end(batch: Batch) -> Proposals | BatchDetections:
        return model.detect(batch.images, batch.sizes, rpn.propose(batch.images, batch.sizes)) if rpn else predict(batch)

    if fixed is None:
        origin = {"row": context.cfg.row, "fingerprint": context.fingerprint} if model.roi else None
        threshold = getattr(context.cfg.task, "mask_threshold", 0.5)
        proposer = propose if context.cfg.proposal_recall else None
        return Trained(model, validation, predict, predict_end_to_end, origin, threshold, proposer)
    validation = WithProposals(validation, fixed.val_ids, fixed.val_boxes, context.cfg.task.roi.proposals[1])
    origin = {"row": fixed.row, "fingerprint": fixed.fingerprint}
    return Trained(model, validation, predict, predict_end_to_end, origin)


def _with_train_proposals(context: RunContext, fixed: FixedProposals) -> WithProposals:
    """Return the training split with fixed proposals."""
    return WithProposals(context.inputs.training, fixed.train_ids, fixed.train_boxes, context.cfg.task.roi.proposals[0])


def _build_initialised(context: RunContext, heads: tuple[str, ...], cfg: Config | None = None) -> Detector:
    """Build the row's network (or that of `cfg`) with these heads and starting weights, on the run's device."""
    cfg = cfg or context.cfg
    model = build.build_detector(cfg, num_classes=len(context.inputs.training.categories), heads=heads)
    init.initialise(model, cfg.seed)
    if context.inputs.weights is not None:
        backbone.load_backbone(model, context.inputs.weights)
    model = place(model, context.inputs.device)
    return optimise(model, context.inputs.device) if cfg.recipe.fast else model


def _load(context: RunContext, cfg: Config, folder: Path, heads: tuple[str, ...]) -> Detector:
    """Load the network of a finished run."""
    model = _build_initialised(context, heads, cfg)
    try:
        model.load_state_dict(load_torch(folder / MODEL))
    except Exception as error:  # torch raises many kinds for a file that is not one of its own
        reason = first_line(error)
        raise UserError(f"{folder / MODEL}: cannot be read ({reason}); remove its folder to train the run again") from None
    return model.eval()


def _freeze_trunk(model: Detector) -> None:
    """Freeze backbone and neck, batch statistics included."""
    for part in (model.backbone, model.neck):
        freeze_batch_norm(part).requires_grad_(False)


def _share_trunk(model: Detector, other: Detector) -> Detector:
    """Replace backbone and neck of `model` by those of `other`."""
    model.backbone, model.neck = other.backbone, other.neck
    return model


def _propose(context: RunContext, rpn: Detector, row: str, fingerprint: str) -> FixedProposals:
    """Propose on both splits; `row` and `fingerprint` are of the run that trained `rpn`."""
    inputs, cfg = context.inputs, context.cfg
    origin = (row, fingerprint)
    return FixedProposals.from_rpn(rpn, inputs.splits, cfg.recipe, inputs.device, *origin, cfg.workers, context.ranks)


def _train(
    context: RunContext, model: nn.Module, dataset: DetectionDataset, steps: int, checkpoint: str = CHECKPOINT, before: int = 0
) -> None:
    """Train, or resume from the run's checkpoint; `before`: steps of earlier stages, added to the steps in the log."""
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
        advance=context.advance,
        ranks=context.ranks,
    )

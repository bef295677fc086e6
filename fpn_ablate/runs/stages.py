"""Stages of a run that all its ranks carry out: making proposals, training, prediction. Rank 0 does the rest alone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from fpn_ablate.config.schema import Recipe
from fpn_ablate.engine import procedures
from fpn_ablate.engine.evaluate import predict
from fpn_ablate.evaluation.coco import DetectionSet
from fpn_ablate.structures.batch import Batch
from fpn_ablate.structures.instances import BatchDetections, Proposals
from fpn_ablate.utils.errors import UserError, first_line


def prepare_proposals(context: procedures.RunContext) -> procedures.ProposalSupply:
    """Return the proposals that a run learns from."""
    with _out_of_memory(_smaller_evaluation(context.cfg.recipe)):
        return procedures.prepare_proposals(context)


def train(context: procedures.RunContext, supply: procedures.ProposalSupply) -> procedures.Trained:
    """Train the run's network, or load that which it tests."""
    parts = context.cfg.recipe.accumulate
    with _out_of_memory(f"recipe.accumulate above {parts}, for all rows: the same update from fewer images at a time"):
        return procedures.train_or_load(context, supply)


def test(
    context: procedures.RunContext, trained: procedures.Trained, advance: Callable[[int], None] = lambda images: None
) -> tuple[DetectionSet, DetectionSet | None]:
    """Predict on the validation split; return detections, and proposals if their recall is evaluated beside them.

    `advance`: called with the number of images of each batch of the detections.
    """

    def predicted(batch: Batch) -> Proposals | BatchDetections:
        result = trained.predict(batch)
        advance(len(batch.image_ids))
        return result

    cfg, device = context.cfg, context.inputs.device
    settings = {"workers": cfg.workers, "count": cfg.recipe.eval_images, "mask_threshold": trained.mask_threshold}
    settings |= {"ranks": context.ranks}
    with _out_of_memory(_smaller_evaluation(cfg.recipe)):
        detections = predict(predicted, trained.validation, cfg.recipe, device, **settings)
        proposals = predict(trained.propose, trained.validation, cfg.recipe, device, **settings) if trained.propose else None
    return detections, proposals


def _smaller_evaluation(recipe: Recipe) -> str:
    return f"recipe.eval_batch_size below {recipe.eval_batch_size}"


@contextmanager
def _out_of_memory(setting: str) -> Iterator[None]:
    """Name the setting that needs less memory."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(f"out of memory: set {setting} ({first_line(error)})") from None

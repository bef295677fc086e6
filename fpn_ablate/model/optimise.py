"""Replace modules of a detector by faster variants, which compute the same.

Everything that is done for speed alone is put in here; without this call the model runs as model/ says, from the papers.
"""

import torch
from torch import nn

from fpn_ablate.model.detectors.two_stage import Detector
from fpn_ablate.model.heads.box_head import TwoFC
from fpn_ablate.model.heads.retinanet import RetinaNetHead
from fpn_ablate.model.heads.roi_pooler import RoIPooler
from fpn_ablate.model.heads.rpn import RPN, LevelHeads, RPNHead
from fpn_ablate.model.ops.box_head import FastTwoFC
from fpn_ablate.model.ops.fold_batch_norm import fold_batch_norm
from fpn_ablate.model.ops.onednn import Conv2d, Linear
from fpn_ablate.model.ops.replace import variant
from fpn_ablate.model.ops.retinanet import FastRetinaNetHead
from fpn_ablate.model.ops.roi_align import FastRoIPooler
from fpn_ablate.model.ops.rpn import FastRPN, SparseRPN
from fpn_ablate.model.ops.sparse_conv import LazyConv2d, is_plain_3x3


def optimise(detector: Detector, device: torch.device) -> Detector:
    """Put in the variants that are faster on `device`; names, parameters and state dict stay.

    A variant replaces exactly the class that it was written for. A user's part keeps its modules but for plain convolutions,
    and tells what may be done to it: `Backbone.runs_in_order`, `Neck.final_convs`.
    """
    if detector.backbone.runs_in_order:
        fold_batch_norm(detector.backbone)
        if detector.roi and detector.roi.box_head.backbone_stage:
            fold_batch_norm(detector.roi.box_head)
    _replace(detector, "rpn", RPN, SparseRPN if detector.rpn and _is_sparse(detector.rpn.head) else FastRPN)
    _replace(detector, "head", RetinaNetHead, FastRetinaNetHead)
    if device.type == "cuda":
        if isinstance(detector.rpn, FastRPN):
            detector.rpn.one_nms = True
        return detector
    if isinstance(detector.rpn, SparseRPN) and detector.roi is None:
        for name in detector.neck.final_convs:
            conv = detector.neck.get_submodule(name)
            if type(conv) is nn.Conv2d and is_plain_3x3(conv):
                lazy = variant(conv, LazyConv2d)
                lazy.max_cells = detector.rpn.max_sampled_cells
                detector.neck.set_submodule(name, lazy)
    for name, module in list(detector.named_modules()):
        if type(module) is nn.Conv2d:
            detector.set_submodule(name, variant(module, Conv2d))
    for name in ("roi.pooler", "roi.mask.pooler"):
        _replace(detector, name, RoIPooler, FastRoIPooler)
    _replace(detector, "roi.box_head", TwoFC, FastTwoFC)
    for name in ("predictor.scores", "predictor.deltas", "mask.head.fc1", "mask.head.fc2", "mask.head.logits"):
        _replace(detector, f"roi.{name}", nn.Linear, Linear)
    return detector


def _is_sparse(head: nn.Module) -> bool:
    """Return whether `SparseRPN` computes what this head of an RPN, or each level's own, does."""
    heads = head.levels.values() if type(head) is LevelHeads else [head]
    return all(type(one) is RPNHead for one in heads)


def _replace(detector: Detector, name: str, plain: type[nn.Module], fast: type[nn.Module]) -> None:
    """Replace the module of this name, if there is one of exactly the class `plain`."""
    module = dict(detector.named_modules()).get(name)
    if type(module) is plain:
        detector.set_submodule(name, variant(module, fast))

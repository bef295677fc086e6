#!/usr/bin/env python
"""Time a training step and inference against torchvision's detector of the same shape, and against the machine's limits.

    python scripts/benchmarks/speed.py [--out FILE] [--readme FILE] [--threads N] [--seconds S] [--large] [--device cpu|cuda]

Both detectors have the same backbone (ours, copied), weights, anchors, numbers of proposals and of RoIs, images, objects and
optimiser. They are timed in turns (A B A B ...), so that a busy machine slows all of them alike. Neither loads images, clips
gradients or evaluates. The tables show medians and minima of processor time and of wall time.

On a CPU: the small ResNet-FPN at 128 and 256 px with 16 images; --large adds ResNet-50-FPN at 800 px with one image. On a GPU:
ResNet-50-FPN at 800 x 1333 with 16 images, in bf16 (not yet run on one).
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FasterRCNN, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.retinanet import RetinaNet, RetinaNetHead
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from fpn_ablate.config.composition import register
from fpn_ablate.config.rows import compose_rows
from fpn_ablate.config.schema import Config
from fpn_ablate.data.loader import training_batches
from fpn_ablate.data.shapes import World, load
from fpn_ablate.data.transforms import Resize
from fpn_ablate.engine.cost import synchronise
from fpn_ablate.engine.optim import build_optimizer, set_learning_rate
from fpn_ablate.engine.train import autocast, batch_targets
from fpn_ablate.model import build, init
from fpn_ablate.model.detectors.dense import DenseDetector
from fpn_ablate.model.detectors.two_stage import Detector
from fpn_ablate.model.heads import retinanet, roi, rpn
from fpn_ablate.model.ops.onednn import linear
from fpn_ablate.model.ops.sparse_conv import LazyMap
from fpn_ablate.model.optimise import optimise
from fpn_ablate.model.precision import uses_bf16
from fpn_ablate.model.summary import CLASSES
from fpn_ablate.runs.environment import environment, machine
from fpn_ablate.structures.batch import Batch
from fpn_ablate.structures.levels import Features
from fpn_ablate.utils.blocks import fill_blocks
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.files import save_text
from fpn_ablate.utils.seeding import torch_generator

BLOCK = "bench"  # of a README
OURS, THEIRS, LIMIT = "ours", "torchvision", "layers alone"
CHANNELS_LAST = "channels_last"  # the memory format of our detector
BACKGROUND = 4  # torchvision's head has box deltas for the background too; they never get a gradient
JOINT, RPN = ("task=faster_rcnn", "task.training=joint"), ("task=rpn",)
SMALL = ("recipe=quick", "backbone.freeze_at=0", "recipe.roi.samples=128")
R50 = ("recipe=torchvision",)  # the first two stages of its backbone and its batch norms are frozen
RETINANET = ("ablation=retinanet/torchvision",)
EQUAL = ("ablation=fpn", "rpn.anchor_grid=torchvision", f"recipe.roi.loss_beta={1 / 9}")
COPY = "copy, read and written (GB/s)"
Run = Callable[[], object]
# FLOPs of each operator. torch's counter lacks the one of `ops.onednn.linear`: (M, K) times (N, K).
FLOPS = flop_registry | {
    torch.ops.mkldnn._linear_pointwise: lambda x, weight, *rest, out_val=None: 2 * x.numel() * len(weight),
}


@dataclass(frozen=True)
class Case:
    """A detector and its input.

    Attributes:
        arguments: as on the command line, without the sizes.
        size: (height, width) of the images; the recipe's sides follow from it.
        warmup_steps: training steps on the one batch before anything is measured. More boxes reach the NMS of an untrained
            detector than that of a trained one.
    """

    name: str
    arguments: tuple[str, ...]
    size: tuple[int, int]
    batch: int
    classes: int
    warmup_steps: int = 0


def cases(large: bool, device: torch.device) -> list[Case]:
    """List the cases of a device; `large` adds ResNet-50 on a CPU."""
    if device.type == "cuda":
        bf16 = (*R50, "recipe.bf16=true")
        return [
            Case(f"{name}, ResNet-50, 800 x 1333", (*bf16, *task), (800, 1333), 16, CLASSES)
            for name, task in (("Faster R-CNN", JOINT), ("RPN", RPN))
        ]
    small = [
        Case(f"{name}, small, {side} px", (*SMALL, *task), (side, side), 16, 6, warmup_steps=10)
        for side in (128, 256)
        for name, task in (("Faster R-CNN", JOINT), ("RPN", RPN), ("RetinaNet", RETINANET))
    ]
    if not large:
        return small
    return small + [
        Case(f"{name}, ResNet-50, 800 x 1066", (*R50, *task), (800, 1066), 1, CLASSES)
        for name, task in (("Faster R-CNN", JOINT), ("RPN", RPN), ("RetinaNet", RETINANET))
    ]


# Two equal detectors


def case_config(case: Case) -> Config:
    """Compose the configuration as the command line does."""
    register()
    sides = (f"recipe.short_side={min(case.size)}", f"recipe.max_side={max(case.size)}", f"recipe.batch_size={case.batch}")
    return compose_rows([*EQUAL, *case.arguments, *sides])[0]


def case_batch(case: Case) -> Batch:
    """Return one batch of the generated world, at its native size."""
    world = World(height=case.size[0], width=case.size[1])
    dataset, _ = load(world, case.batch, 1)
    resize = Resize(min(case.size), max(case.size))
    return next(training_batches(dataset, resize=resize, batch_size=case.batch, steps=range(1), seed=0, flip=False))


def our_model(case: Case, cfg: Config, batch: Batch) -> Detector:
    """Build our detector with random weights and the faster modules.

    Frozen batch norms get the statistics of the batch. Without any, activations would grow from block to block.
    """
    model = build.build_detector(cfg, num_classes=case.classes)
    init.initialise(model, 0)
    model = model.to(batch.images.device, memory_format=torch.channels_last).train()
    norms = [m for m in model.backbone.modules() if isinstance(m, FrozenBatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(_take_statistics) for norm in norms]
    with torch.no_grad():
        model.features(batch.images, batch.sizes)
    for hook in hooks:
        hook.remove()
    return optimise(model, batch.images.device)


def _take_statistics(norm: FrozenBatchNorm2d, inputs: tuple[Tensor]) -> None:
    norm.running_mean.copy_(inputs[0].mean((0, 2, 3)))
    norm.running_var.copy_(inputs[0].var((0, 2, 3)))


class Pyramid(nn.Module):
    """A copy of our backbone, of plain modules as torchvision's backbones are, under torchvision's FPN."""

    def __init__(self, ours: Detector, cfg: Config) -> None:
        super().__init__()
        self.out_channels = ours.neck.levels[0].channels
        self.body = build.build_detector(cfg, heads=()).backbone
        self.body.load_state_dict(ours.backbone.state_dict())
        self.read = [name.replace("p", "c") for name in ours.neck.lateral]
        widths = [level.channels for level in ours.backbone.levels if level.name in self.read]
        dense, width = isinstance(ours, DenseDetector), self.out_channels
        self.fpn = FeaturePyramidNetwork(widths, width, LastLevelP6P7(width, width) if dense else LastLevelMaxPool())
        if dense:
            _copy(ours.neck.p6_conv["p6"], self.fpn.extra_blocks.p6)
            _copy(ours.neck.p7_conv["p7"], self.fpn.extra_blocks.p7)
        for number, name in enumerate(ours.neck.lateral):
            _copy(ours.neck.lateral[name], self.fpn.inner_blocks[number][0])
            _copy(ours.neck.smooth[name], self.fpn.layer_blocks[number][0])

    def forward(self, images: Tensor) -> Features:
        maps = self.body(images)
        return self.fpn({name: maps[name] for name in self.read})


def _copy(ours: nn.Module, theirs: nn.Module, skip_rows: int = 0) -> None:
    """Copy weights and biases; the first `skip_rows` rows of `theirs` stay as they are."""
    with torch.no_grad():
        theirs.weight[skip_rows:].copy_(ours.weight)
        theirs.bias[skip_rows:].copy_(ours.bias)


def their_retinanet(ours: DenseDetector, cfg: Config, case: Case) -> RetinaNet:
    """Build torchvision's RetinaNet with the settings and weights of ours.

    A random row of scores stands for background, which ours lacks; and weights of one anchor serve another, since theirs are in
    another order. Neither changes the work.
    """
    task, grids = ours.head.config, ours.head.anchors
    sides = {"min_size": min(case.size), "max_size": max(case.size), "_skip_resize": True}
    anchors = AnchorGenerator(tuple(tuple(map(int, sizes)) for sizes in grids.sizes), (tuple(grids.ratios),) * len(grids.sizes))
    per_cell = len(grids.sizes[0]) * len(grids.ratios)
    pyramid = Pyramid(ours, cfg)
    model = RetinaNet(
        pyramid,
        case.classes + 1,
        **sides,
        anchor_generator=anchors,
        head=RetinaNetHead(pyramid.out_channels, per_cell, case.classes + 1),
        score_thresh=task.score_thresh,
        nms_thresh=task.nms_thresh,
        detections_per_img=task.detections,
        topk_candidates=task.pre_nms_topk,
    )
    classes, boxes = model.head.classification_head, model.head.regression_head
    for subnet, convs in ((ours.head.class_subnet, classes.conv), (ours.head.box_subnet, boxes.conv)):
        for block, conv in zip(subnet, convs, strict=True):
            _copy(block[0], conv[0])
    _copy(ours.head.scores, classes.cls_logits, skip_rows=per_cell)
    _copy(ours.head.deltas, boxes.bbox_reg)
    return model.to(next(ours.parameters()).device).train()


def their_model(ours: Detector, cfg: Config, case: Case) -> FasterRCNN | RetinaNet:
    """Build torchvision's detector with the settings and weights of ours: RetinaNet, or Faster R-CNN, without a second stage
    where ours has none."""
    if isinstance(ours, DenseDetector):
        return their_retinanet(ours, cfg, case)
    rpn = ours.rpn.config
    sides = {"min_size": min(case.size), "max_size": max(case.size), "_skip_resize": True}
    train_pre, test_pre = rpn.pre_nms_topk
    train_post, test_post = ours.roi.config.proposals if ours.roi else rpn.post_nms_topk
    numbers = {
        "rpn_pre_nms_top_n_train": train_pre,
        "rpn_pre_nms_top_n_test": test_pre,
        "rpn_post_nms_top_n_train": train_post,
        "rpn_post_nms_top_n_test": test_post,
        "rpn_nms_thresh": rpn.nms_thresh,
        "rpn_fg_iou_thresh": rpn.positive_iou,
        "rpn_bg_iou_thresh": rpn.negative_iou,
        "rpn_batch_size_per_image": rpn.samples,
        "rpn_positive_fraction": rpn.positive_fraction,
    }
    anchors = AnchorGenerator(tuple(map(tuple, ours.rpn.level_sizes)), (tuple(rpn.anchor_ratios),) * len(ours.rpn.level_sizes))
    second = _second_stage(ours) if ours.roi else {"num_classes": case.classes + 1}
    model = FasterRCNN(Pyramid(ours, cfg), rpn_anchor_generator=anchors, **sides, **numbers, **second)
    _copy(ours.rpn.head.conv, model.rpn.head.conv[0][0])
    _copy(ours.rpn.head.objectness, model.rpn.head.cls_logits)
    _copy(ours.rpn.head.deltas, model.rpn.head.bbox_pred)
    if ours.roi is None:
        model.roi_heads = None
    return model.to(next(ours.parameters()).device).train()


def _second_stage(ours: Detector) -> dict[str, Any]:
    """Return the arguments of torchvision's Faster R-CNN for its second stage, with our weights."""
    heads, pooler = ours.roi, ours.roi.pooler
    s, hidden = heads.config, heads.box_head.out_channels
    pool = MultiScaleRoIAlign(
        [level.name.replace("p", "c") for level in pooler.levels],  # torchvision's FPN keeps the names of its inputs
        pooler.resolution,
        pooler.sampling_ratio,
        canonical_scale=pooler.canonical_box_size,
        canonical_level=pooler.canonical_level,
    )
    box_head = TwoMLPHead(pooler.in_channels * pooler.resolution**2, hidden)
    predictor = FastRCNNPredictor(hidden, heads.predictor.scores.out_features)
    _copy(heads.box_head.fc6, box_head.fc6)
    _copy(heads.box_head.fc7, box_head.fc7)
    _copy(heads.predictor.scores, predictor.cls_score)
    _copy(heads.predictor.deltas, predictor.bbox_pred, skip_rows=BACKGROUND)
    return {
        "box_roi_pool": pool,
        "box_head": box_head,
        "box_predictor": predictor,
        "box_score_thresh": s.score_thresh,
        "box_nms_thresh": s.nms_thresh,
        "box_detections_per_img": s.detections,
        "box_fg_iou_thresh": s.positive_iou,
        "box_bg_iou_thresh": s.positive_iou,
        "box_batch_size_per_image": s.samples,
        "box_positive_fraction": s.positive_fraction,
        "bbox_reg_weights": tuple(s.box_weights),
    }


def their_input(batch: Batch) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Convert the batch to torchvision's input: images in 0..1 without padding, objects as dictionaries."""
    images = [image[:, :h, :w].float() / 255 for image, (h, w) in zip(batch.images, batch.sizes.tolist(), strict=True)]
    columns = zip(batch.boxes, batch.labels, batch.valid, strict=True)
    return images, [{"boxes": boxes[valid], "labels": labels[valid]} for boxes, labels, valid in columns]


# What is timed


class Step:
    """A training step: zero the gradients, losses, backward, optimiser."""

    def __init__(self, model: nn.Module, losses: Callable[[], dict[str, Tensor]], cfg: Config) -> None:
        self.optimizer = build_optimizer(model, cfg.recipe.optimizer)
        self.losses, self.context = losses, partial(autocast, cfg.recipe.bf16, next(model.parameters()).device)

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        with self.context():
            losses = self.losses()
        total = torch.stack(list(losses.values())).sum()
        total.backward()
        self.optimizer.step()
        return total.detach()


def their_rpn_losses(
    model: FasterRCNN, images: list[Tensor], objects: list[dict[str, Tensor]], proposals: bool
) -> dict[str, Tensor]:
    """Compute the losses of torchvision's RPN.

    With `proposals` through its `forward`, which makes proposals in training too, even if nothing reads them. Without, through
    its other methods, which a user would have to call one by one.
    """
    rpn, (image_list, objects) = model.rpn, model.transform(images, objects)
    features = model.backbone(image_list.tensors)
    if proposals:
        return rpn(image_list, features, objects)[1]
    objectness, deltas = concat_box_prediction_layers(*rpn.head(list(features.values())))
    anchors = rpn.anchor_generator(image_list, list(features.values()))
    labels, matched = rpn.assign_targets_to_anchors(anchors, objects)
    return dict(enumerate(rpn.compute_loss(objectness, deltas, labels, rpn.box_coder.encode(matched, anchors))))


def layers_alone(model: Detector, batch: Batch, cfg: Config, training: bool) -> Run:
    """Return a function that runs the layers that our detector needs, and nothing between them.

    Left out: anchors, matching, NMS, RoI pooling, losses (the sum of all outputs stands in for them) and the optimiser. It is
    the limit of any detector made of torch's layers, not of the machine.

    Training: backbone and neck, the RPN head at the sampled anchors and the second stage on the sampled RoIs, forward and
    backward; for the proposals the RPN head on every cell, forward. Inference: all layers forward, the second stage on as many
    RoIs as there are proposals.
    """
    n, device = len(batch.images), batch.images.device
    if isinstance(model, DenseDetector):
        return _dense_layers_alone(model, batch, cfg, training)
    head, channels = model.rpn.head, model.neck.levels[0].channels
    cell_counts = _sampled_cell_counts(model, batch, cfg) if training else []
    patches = torch.rand(n * cfg.rpn.samples, 9 * channels, device=device, requires_grad=training)
    pooled = None
    if model.roi:
        count = model.roi.config.samples if training else model.roi.config.proposals[1]
        side = model.roi.pooler.resolution
        pooled = torch.rand(n * count, channels, side, side, device=device, requires_grad=training)

    def run() -> None:
        with autocast(cfg.recipe.bf16, device), torch.set_grad_enabled(training):
            levels = model.features(batch.images, batch.sizes)
            counts = iter(cell_counts)
            out = [x.at(torch.arange(next(counts), device=device)) if isinstance(x, LazyMap) else x for x in levels.values()]
            if training:
                hidden = linear(patches, head.conv.weight.flatten(1), head.conv.bias)
                out += [linear(hidden, layer.weight.flatten(1), layer.bias) for layer in (head.objectness, head.deltas)]
            if pooled is not None:
                out += model.roi.predictor(model.roi.box_head(pooled))
            if pooled is not None or not training:
                with torch.no_grad():
                    head(levels)
        if training:
            model.zero_grad(set_to_none=True)
            # The gradients of a sum, in the layout of the maps. Those of `sum` have another layout and would be copied.
            torch.autograd.backward(out, [torch.ones_like(x) for x in out])

    return run


def _dense_layers_alone(model: DenseDetector, batch: Batch, cfg: Config, training: bool) -> Run:
    def run() -> None:
        with autocast(cfg.recipe.bf16, batch.images.device), torch.set_grad_enabled(training):
            out = [x for column in model.head(model.features(batch.images, batch.sizes)) for x in column]
        if training:
            model.zero_grad(set_to_none=True)
            torch.autograd.backward(out, [torch.ones_like(x) for x in out])

    return run


def _sampled_cell_counts(model: Detector, batch: Batch, cfg: Config) -> list[int]:
    """Count the cells that a step reads of each lazily convolved map, finest first."""
    counts, at = [], LazyMap.at
    with patch.object(LazyMap, "at", lambda self, cell: counts.append(len(cell)) or at(self, cell)):
        our_step(model, batch, cfg).losses()
    return counts


def contenders(case: Case, cfg: Config, ours: Detector, batch: Batch) -> Iterator[tuple[str, dict[str, Run]]]:
    """Yield each task with its contenders, ours first. All models are in the task's mode until the next task is requested."""
    theirs, last = (their_model(ours, cfg, case) for _ in range(2))
    models = {THEIRS: theirs, f"{THEIRS}, {CHANNELS_LAST}": last.to(memory_format=torch.channels_last)}
    images, objects = their_input(batch)  # once, since a loader would deliver them in this form
    steps = {OURS: our_step(ours, batch, cfg)}
    for name, model in models.items():
        losses = model if ours.detects else partial(their_rpn_losses, model, proposals=True)
        steps[name] = Step(model, partial(losses, images, objects), cfg)
    if not ours.detects:
        losses = partial(their_rpn_losses, last, images, objects, proposals=False)
        steps[f"{THEIRS}, {CHANNELS_LAST}, no proposals"] = Step(last, losses, cfg)
    for step in steps.values():
        set_learning_rate(step.optimizer, 0.0)  # so that each repetition does the same work on the same weights
    yield "training step", {**steps, LIMIT: layers_alone(ours, batch, cfg, training=True)}
    if ours.detects:
        calls: dict[str, Run] = {OURS: lambda: ours.detect(batch.images, batch.sizes)}
        calls |= {name: partial(model.eval(), images) for name, model in models.items()}
        context = partial(autocast, cfg.recipe.bf16, batch.images.device)
        calls = {name: partial(_without_gradients, run, context) for name, run in calls.items()}
        yield "inference", {**calls, LIMIT: layers_alone(ours.eval(), batch, cfg, training=False)}


def our_step(model: Detector, batch: Batch, cfg: Config) -> Step:
    """Return a training step of our detector on the batch."""
    generator = torch_generator(0, "sampling", device=batch.images.device)
    return Step(model, lambda: model.losses(batch.images, batch_targets(batch), lambda _: generator), cfg)


def _without_gradients(run: Run, context: Callable[[], torch.autocast]) -> object:
    with torch.no_grad(), context():
        return run()


def count_work(ours: Detector, case: Case, cfg: Config, batch: Batch) -> dict[str, tuple[int, int]]:
    """Count what must be equal for a fair comparison, of ours and of torchvision's."""
    theirs, (images, objects) = their_model(ours, cfg, case), their_input(batch)
    trained = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (ours, theirs)]
    if isinstance(ours, DenseDetector):
        return _count_dense_work(ours, theirs, batch, trained)
    with torch.no_grad():
        features = ours.features(batch.images, batch.sizes)
        topk = ours.roi.config.proposals[0] if ours.roi else None
        our_proposals = ours.rpn.propose(*ours.rpn(features), batch.sizes, to_train=True, topk=topk)
        image_list, objects = theirs.transform(images, objects)
        their_features = theirs.backbone(image_list.tensors)
        proposals, _ = theirs.rpn(image_list, their_features, objects)
        anchors = theirs.rpn.anchor_generator(image_list, list(their_features.values()))[0]
        counts = {
            "images": (tuple(batch.images.shape), tuple(image_list.tensors.shape)),
            "anchors an image": (sum(map(len, ours.rpn.anchors(features))), len(anchors)),
            "proposals": (int(our_proposals.valid.sum()), sum(map(len, proposals))),
        }
        if ours.roi:
            trained[1] -= BACKGROUND * (ours.roi.box_head.out_channels + 1)
            generator = torch_generator(0, device=batch.images.device)
            *_, sampled_mask = ours.roi.sample(our_proposals, batch_targets(batch), generator)
            rois, *_ = theirs.roi_heads.select_training_samples(proposals, objects)
            counts["RoIs"] = (int(sampled_mask.sum()), sum(map(len, rois)))
    return {"parameters trained": tuple(trained), **counts}


def _count_dense_work(ours: DenseDetector, theirs: RetinaNet, batch: Batch, trained: list[int]) -> dict[str, tuple[int, int]]:
    image_list, _ = theirs.transform(their_input(batch)[0])
    with torch.no_grad():
        features, their_features = ours.features(batch.images, batch.sizes), theirs.backbone(image_list.tensors)
    anchors = theirs.anchor_generator(image_list, list(their_features.values()))[0]
    channels, per_cell = ours.head.scores.in_channels, ours.head.deltas.out_channels // 4
    trained[1] -= per_cell * (9 * channels + 1)  # the scores of background
    return {
        "parameters trained": (trained[0], trained[1]),
        "images": (tuple(batch.images.shape), tuple(image_list.tensors.shape)),
        "anchors an image": (sum(map(len, ours.head.anchors(features))), len(anchors)),
    }


# Timing


def time_in_turns(
    runs: dict[str, Run], seconds: float, min_rounds: int, device: torch.device
) -> dict[str, dict[str, list[float]]]:
    """Time all runs once a round, for about `seconds` and at least `min_rounds` rounds, after one round that does not count.

    Returns:
        name -> processor and wall seconds of each round.
    """
    times: dict[str, dict[str, list[float]]] = {name: {"processor": [], "wall": []} for name in runs}
    for run in runs.values():
        run()
    began, rounds = time.perf_counter(), 0
    while rounds < min_rounds or time.perf_counter() - began < seconds:
        for name, run in runs.items():
            synchronise(device)
            wall, processor = time.perf_counter(), time.process_time()
            run()
            synchronise(device)  # a GPU is still busy when the call returns
            times[name]["processor"].append(time.process_time() - processor)
            times[name]["wall"].append(time.perf_counter() - wall)
        rounds += 1
    return times


def clock_of(device: torch.device) -> str:
    """Return the clock that ratios use. Processor time excludes other programs, but it does not see a GPU's work."""
    return "wall" if device.type == "cuda" else "processor"


class Roofline(TorchDispatchMode):
    """Count the FLOPs and bytes of operators, and the least time that `peak` GFLOP/s and `copy` GB/s allow for them.

    Each operator is assumed to read its inputs from memory and to write its outputs there (caches make it less), and to compute
    meanwhile. Work outside torch's operators (SciPy sorts the entries of RoIAlign) is not counted.
    """

    def __init__(self, peak: float, copy: float) -> None:
        super().__init__()
        self.peak, self.copy = peak * 1e9, copy * 1e9
        self.flop = self.moved = 0
        self.seconds = 0.0

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        out = operator(*args, **kwargs)
        if not operator.is_view:
            count = FLOPS.get(operator.overloadpacket)
            flop = count(*args, **kwargs, out_val=out) if count else 0
            moved = sum(x.nbytes for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor))
            self.flop, self.moved = self.flop + flop, self.moved + moved
            self.seconds += max(flop / self.peak, moved / self.copy)
        return out


def summary(
    runs: dict[str, Run], times: dict[str, dict[str, list[float]]], batch: int, peak: float, copy: float, clock: str
) -> dict:
    """Return the figures of each contender; `peak` in GFLOP/s, `copy` in GB/s."""
    figures = {}
    ours = statistics.median(times[OURS][clock])
    for name, run in runs.items():
        with Roofline(peak, copy) as counter:
            run()
        gflop, took = counter.flop / 1e9, statistics.median(times[name][clock])
        clocks = {kind: {"median": statistics.median(t), "minimum": min(t)} for kind, t in times[name].items()}
        figures[name] = {
            **{f"{kind} (s)": {key: _rounded(value) for key, value in both.items()} for kind, both in clocks.items()},
            "times ours, medians": round(took / ours, 3),
            "times ours, minima": round(clocks[clock]["minimum"] / min(times[OURS][clock]), 3),
            "images a second": _rounded(batch / clocks["wall"]["median"]),
            "GFLOP": _rounded(gflop),
            "GFLOP/s": _rounded(gflop / took),
            "share of peak": round(gflop / took / peak, 3),
            "GB": _rounded(counter.moved / 1e9),
            "roofline (s)": _rounded(counter.seconds),
            "share of roofline": round(counter.seconds / took, 3),
        }
    return figures


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


class PartTimer:
    """Sum the seconds of our detector's parts by wrapping their functions in a clock."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, defaultdict(float)
        self.clock = time.perf_counter if clock_of(device) == "wall" else time.process_time

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        synchronise(self.device)
        began = self.clock()
        yield
        synchronise(self.device)
        self.seconds[name] += self.clock() - began

    def wrap(self, name: str, function: Callable) -> Callable:
        def run(*arguments: Any, **options: Any) -> Any:
            with self.time(name):
                return function(*arguments, **options)

        return run


def breakdown(model: Detector, run: Run, device: torch.device, repeats: int) -> dict[str, float]:
    """Measure the median seconds of each part of `run`, on the clock that ratios use. No part lies within another."""
    step = run.optimizer if isinstance(run, Step) else None
    dense = [("head", model.head, "forward"), ("matching", retinanet, "match")] if isinstance(model, DenseDetector) else []
    proposer = (
        [
            ("RPN head, every cell", model.rpn.head, "forward"),
            ("RPN head, sampled anchors", model.rpn, "predict_at"),
            *(("matching and sampling", module, name) for module in (rpn, roi) for name in ("match", "sample")),
            ("proposals, with NMS", model.rpn, "propose"),
        ]
        if model.rpn
        else []
    )
    functions = [
        ("backbone and neck", model, "features"),
        *proposer,
        *dense,
        *([("backward", torch.Tensor, "backward"), ("optimiser", step, "step")] if step else []),
    ]
    if model.roi:
        functions += [
            ("RoI pooling", model.roi.pooler, "forward"),
            ("box head", model.roi.box_head, "forward"),
            ("box head", model.roi.predictor, "forward"),
            ("detections, with NMS", model.roi, "_suppress"),
        ]
    rounds = [_time_parts(functions, run, device) for _ in range(repeats)]
    names = list(dict.fromkeys(name for seconds in rounds for name in seconds))
    return {name: _rounded(statistics.median(seconds[name] for seconds in rounds)) for name in names}


def _time_parts(functions: list[tuple[str, Any, str]], run: Run, device: torch.device) -> dict[str, float]:
    timer = PartTimer(device)
    with ExitStack() as stack:
        for name, owner, attribute in functions:
            stack.enter_context(patch.object(owner, attribute, timer.wrap(name, getattr(owner, attribute))))
        with timer.time("all"):
            run()
    total = timer.seconds.pop("all")
    return {**timer.seconds, "the rest": total - sum(timer.seconds.values()), "all": total}


def peaks(device: torch.device) -> dict[str, float]:
    """Measure the best rates of the machine.

    A product of square matrices; a 3x3 convolution as in an FPN (another library computes it, much faster on some processors);
    and a copy too large for caches.
    """
    gpu, in_bf16 = device.type == "cuda", uses_bf16(True, device)
    side, images = (8192, 16) if gpu else (2048, 1)
    rates = {}
    for dtype in (torch.float32, torch.bfloat16) if in_bf16 else (torch.float32,):
        a, b = (torch.rand(side, side, device=device, dtype=dtype) for _ in range(2))
        rates[_rate("GEMM", dtype)] = _rounded(2 * side**3 / 1e9 / _best(partial(torch.mm, a, b), device))
        x = torch.rand(images, 256, 100, 100, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        weight = torch.rand(256, 256, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        work = 2 * x.numel() * weight[0].numel() / 1e9
        rates[_rate("convolution", dtype)] = _rounded(work / _best(partial(F.conv2d, x, weight, padding=1), device))
    source = torch.rand(2**26, device=device)
    target = torch.empty_like(source)
    rates[COPY] = _rounded(2 * source.nbytes / 1e9 / _best(partial(target.copy_, source), device))
    return rates


def _rate(operation: str, dtype: torch.dtype) -> str:
    return f"{operation} {str(dtype).removeprefix('torch.')} (GFLOP/s)"


def _best(run: Run, device: torch.device) -> float:
    return min(time_in_turns({"": run}, seconds=1.0, min_rounds=5, device=device)[""][clock_of(device)])


# The command


def measure(case: Case, device: torch.device, seconds: float, min_rounds: int, peak: dict[str, float]) -> dict[str, Any]:
    """Measure a case. Each comparison takes about `seconds` and at least `min_rounds` rounds; `peak` comes from `peaks`."""
    torch.manual_seed(0)
    cfg, batch = case_config(case), case_batch(case).to(device)
    model = our_model(case, cfg, batch)
    warm_up(model, case, cfg, batch)
    best = max(
        peak[_rate(name, torch.bfloat16 if uses_bf16(cfg.recipe.bf16, device) else torch.float32)]
        for name in ("GEMM", "convolution")
    )
    clock = clock_of(device)
    figures: dict[str, Any] = {
        "images": case.batch,
        "arguments": [*EQUAL, *case.arguments],
        "equal (ours, torchvision's)": count_work(model, case, cfg, batch),
        "compared": {},
    }
    for task, runs in contenders(case, cfg, model, batch):
        times = time_in_turns(runs, seconds, min_rounds, device)
        figures["compared"][task] = {
            "rounds": len(times[OURS]["wall"]),
            "contenders": summary(runs, times, case.batch, best, peak[COPY], clock),
            f"parts of ours ({clock} s)": breakdown(model, runs[OURS], device, min_rounds),
        }
    return figures


def warm_up(model: Detector, case: Case, cfg: Config, batch: Batch) -> None:
    """Train for `case.warmup_steps`. Raises UserError if a loss is not finite."""
    step = our_step(model, batch, cfg)
    losses = [step() for _ in range(case.warmup_steps)]
    if not all(bool(loss.isfinite()) for loss in losses):
        raise UserError(
            f"{case.name}: the loss became infinite or NaN within {case.warmup_steps} steps; nothing can be measured"
        )


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _run(options: argparse.Namespace) -> None:
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device; leave it out, or use --device cpu")
    if options.readme:
        if not options.readme.is_file():
            raise UserError(f"--readme {options.readme}: no such file")
        fill_blocks(options.readme.read_text(encoding="utf-8"), BLOCK, str)  # fail now, not after minutes of work
    torch.set_num_threads(options.threads or (1 if device.type == "cpu" else torch.get_num_threads()))
    commit = environment(device)["commit"]
    results: dict[str, Any] = {"machine": {**machine(device), "torchvision": torchvision.__version__, "commit": commit}}
    results["machine"]["load before"] = round(os.getloadavg()[0], 1)
    results |= {"peak": peaks(device), "cases": {}}
    for case in cases(options.large, device):
        results["cases"][case.name] = measure(case, device, options.seconds, 3, results["peak"])
        print(case_table(case.name, results["cases"][case.name]), flush=True)
        if options.out:
            save_text(options.out, json.dumps(results, indent=1) + "\n")
    print(machine_lines(results))
    if options.readme:
        text = fill_blocks(options.readme.read_text(encoding="utf-8"), BLOCK, lambda _: markdown(results))
        save_text(options.readme, text)


def markdown(results: dict[str, Any]) -> str:
    """Format the results of --out as tables for a README."""
    return "\n".join([*(case_table(name, case) for name, case in results["cases"].items()), machine_lines(results)])


def case_table(name: str, case: dict[str, Any]) -> str:
    """Format the tables of one case, one for training and one for inference."""
    header = ["", "processor (s)", "minimum", "wall (s)", "minimum", "images / s", "x ours", "GFLOP", "GFLOP/s", "of peak"]
    header += ["GB", "of roofline"]
    text = ""
    for task, compared in case["compared"].items():
        lines = [header, ["---", *["---:"] * (len(header) - 1)]]
        for contender, figures in compared["contenders"].items():
            times = [figures[f"{clock} (s)"][kind] for clock in ("processor", "wall") for kind in ("median", "minimum")]
            cells = [*times, figures["images a second"], f"{figures['times ours, medians']:.2f}"]
            work = [f"{figures['GFLOP']:.1f}", f"{figures['GFLOP/s']:.1f}", f"{figures['share of peak']:.0%}"]
            lines.append([contender, *map(str, cells), *work, f"{figures['GB']:.2f}", f"{figures['share of roofline']:.0%}"])
        table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        parts = next(value for key, value in compared.items() if key.startswith("parts"))
        shares = ", ".join(f"{part} {value / parts['all']:.0%}" for part, value in parts.items() if part != "all")
        title = (
            f"**{name}: {task}**, {case['images']} image{'s' * (case['images'] > 1)}, medians of {compared['rounds']} rounds"
        )
        text += f"{title}\n\n{table}\nParts of ours: {shares}.\n\n"
    return text


def machine_lines(results: dict[str, Any]) -> str:
    """Format the machine and its best rates."""
    columns = ("Peak", results["peak"]), ("Machine", results["machine"])
    return (
        "\n\n".join(f"{title}: {', '.join(f'{name} {value}' for name, value in row.items())}." for title, row in columns) + "\n"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python scripts/benchmarks/speed.py", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--readme", type=Path, metavar="FILE", help=f"update the block '<!-- {BLOCK} -->' of this file")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: 1; with a GPU, torch's default)")
    parser.add_argument("--seconds", type=float, default=25.0, help="per comparison, and at least 3 rounds (default: 25)")
    parser.add_argument("--large", action="store_true", help="on a CPU, also ResNet-50-FPN at 800 px (minutes more)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


if __name__ == "__main__":
    sys.exit(main())

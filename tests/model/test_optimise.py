"""The faster variants compute what the plain modules do: losses, all gradients, proposals and detections of whole detectors."""

import copy
import importlib.util
from collections import Counter
from dataclasses import astuple
from functools import partial

import pytest
import torch
from parts import backbone_config, fpn_config, hierarchy_config, single_level_config
from settings import JOINT, ROWS
from torch import nn

from fpn_ablate.model.boxes import clip
from fpn_ablate.model.build import build_detector
from fpn_ablate.model.heads.box_head import TwoFC
from fpn_ablate.model.heads.rpn import RPNHead
from fpn_ablate.model.init import initialise
from fpn_ablate.model.necks.fpn import FPN
from fpn_ablate.model.ops import box_head, fold_batch_norm, onednn, roi_align, rpn, sparse_conv
from fpn_ablate.model.ops.replace import variant
from fpn_ablate.model.optimise import optimise
from fpn_ablate.structures.instances import Proposals, Targets
from fpn_ablate.structures.masks import ObjectMasks
from fpn_ablate.utils import rle
from fpn_ablate.utils.seeding import torch_generator

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SIDES = (96, 128)
TASKS = {"rpn": (), "fast_rcnn": ("task=fast_rcnn",), "joint": JOINT}
MASKS = {head: ("task=mask_rcnn", "task.training=joint", f"task.mask.head={head}") for head in ("fcn", "mlp")}
# Few samples, so that P2 and P3 are lazy, and many boxes that NMS suppresses, so that its first try keeps too few.
NUMBERS = (
    *("recipe.short_side=96", "rpn.samples=8", "rpn.nms_thresh=0.1"),
    *("rpn.pre_nms_topk=[400,300]", "rpn.pre_nms_topk_single=[400,300]", "rpn.post_nms_topk=[150,100]"),
)
SECOND = ("task.roi.proposals=[150,40]", "task.roi.score_thresh=0.1", "task.roi.conv5_resolution=6")
# Without laterals P2 to P4 repeat C5's cells under nearest upsampling: scores tie, and the order of equals is nobody's promise.
ROW_NECKS = {
    **{"c4": {"level": "c4"}, "c5": {"level": "c5"}, "fpn": {}, "bottom_up": {"top_down": False}, "finest": {"output": "p2"}},
    "no_lateral": {"lateral": False, "upsample": "bilinear"},
    "hierarchy": {"start": "c3", "extras": 1, "l2_norm": True},
}
# By the first of their keys.
NECKS = {"level": single_level_config, "start": hierarchy_config}


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def plain(config):
    """`plain("joint", "c4")` -> a detector of plain modules, with scores and statistics of every size.

    `row` has also keys of the neck; `roi` has keys of the second stage.
    """

    def build(task, row="fpn", backbone=None, roi=None, rpn=None, pyramid=False, **neck):
        cfg = config(*NUMBERS, *(() if task == "rpn" else SECOND), *(TASKS | MASKS)[task])
        keys = ROW_NECKS[row] | neck
        of_kind = NECKS.get(next(iter(keys), ""), partial(fpn_config, channels=16))
        parts = {"neck": of_kind(**keys)}
        if rpn:
            parts["rpn"] = cfg.rpn.model_copy(update=rpn)
        if pyramid:
            parts["image_pyramid"] = config("ablation=image_pyramid").image_pyramid
        if backbone:
            parts["backbone"] = backbone_config(backbone, weights="pretrain")
        if roi:
            parts["task"] = cfg.task.model_copy(update={"roi": cfg.task.roi.model_copy(update=roi)})
        model = build_detector(cfg.model_copy(update=parts), num_classes=3)
        initialise(model, 0)
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            draw = torch_generator(0, name)
            if "running_" in name or (name.startswith("backbone") and value.dim() == 1):
                low = 0.1 if name.endswith(("mean", "bias")) else 0.5
                nn.init.uniform_(value, low, 2 * low, generator=draw)
            elif name.startswith(("rpn.head", "roi.predictor", "roi.mask.head.logits")) and value.dim() > 1:
                nn.init.normal_(value, std=0.2, generator=draw)
        return model.to(memory_format=torch.channels_last)

    return build


def batch(sides):
    images = torch.randint(0, 256, (2, 3, *sides), generator=torch_generator(0, "images"), dtype=torch.uint8)
    gt = torch.tensor([[[10.0, 10, 30, 26], [40, 30, 120, 90]], [[4.0, 40, 90, 90], [0, 0, 0, 0]]])
    valid = torch.tensor([[True, True], [True, False]])
    sizes = torch.tensor([sides, (sides[0], sides[1] - 25)])
    bitmaps = [
        torch.rand(int(real.sum()), *size.tolist(), generator=torch_generator(0, "masks")) > 0.3
        for real, size in zip(valid, sizes, strict=True)
    ]
    masks = [ObjectMasks(rle.encode(m.numpy()), m.shape[1:], m.shape[1:]) for m in bitmaps]
    return images, Targets(clip(gt, sizes), torch.tensor([[1, 3], [2, 0]]), valid, torch.zeros_like(valid), sizes, masks)


def given_proposals():
    corner, size = torch.rand(2, 2, 40, 2, generator=torch_generator(0, "proposals")) * 90
    return Proposals(torch.cat([corner, corner + size + 2], -1), torch.ones(2, 40), torch.ones(2, 40, dtype=torch.bool))


def results(model, sides=SIDES):
    """Losses, gradients of all parameters, proposals and detections."""
    images, targets = batch(sides)
    proposals = None if model.rpn else given_proposals()
    losses = model.train().losses(images, targets, lambda purpose: torch_generator(0, purpose), proposals)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(sum(losses.values()), list(parameters.values()), materialize_grads=True)
    out = {name: value.detach() for name, value in losses.items()} | dict(zip(parameters, gradients, strict=True))
    model.eval()
    if model.rpn:
        out |= {f"proposals {n}": x for n, x in enumerate(astuple(model.propose(images, targets.sizes)))}
    if model.roi:
        out |= {f"detections {n}": x for n, x in enumerate(astuple(model.detect(images, targets.sizes, proposals)))}
    return {name: x for name, x in out.items() if x is not None}  # masks, where there are none


def compare(fast, plain, tolerance, sides=SIDES):
    """Compare each tensor by the norm of the difference: a ReLU near 0 may flip in fp32."""
    ours, expected = results(fast, sides), results(plain, sides)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        x = ours[name]
        assert (x.shape, x.dtype) == (value.shape, value.dtype), name
        if x.is_floating_point():
            assert float((x - value).norm()) <= tolerance * float(value.norm()), name
        else:
            assert torch.equal(x, value), name
    return expected


def modules_of_ops(model):
    return {type(m) for m in model.modules() if type(m).__module__.startswith("fpn_ablate.model.ops")}


CASES = [
    *((task, {"row": row}) for task in TASKS for row in ROWS),
    *(("rpn", {"upsample": kind}) for kind in ("bilinear", "deconv")),
    *(("rpn", {"p6": kind}) for kind in ("conv", "none")),
    *((task, {"row": "c4", "pyramid": True}) for task in ("rpn", "joint")),
    *((task, {"row": "bottom_up", "rpn": {"shared": False}}) for task in ("rpn", "joint")),
    ("fast_rcnn", {"roi": {"levels": "all"}}),
    ("rpn", {"rpn": {"relu": False, "scores": 2}}),
    ("rpn", {"row": "hierarchy", "rpn": {"shared": False}}),  # four levels for five sizes: the coarsest has two
    ("rpn", {"smooth": "none"}),
    ("joint", {"smooth": "merged", "upsample": "deconv", "p6": "conv"}),
    ("fcn", {}),
    ("fcn", {"row": "c4"}),
    ("mlp", {}),
    *(("fast_rcnn", {"roi": keys}) for keys in ({"pooling": "pool"}, {"pooling": "align_v2"}, {"sampling_ratio": 0})),
    ("rpn", {"backbone": "resnet18", "row": "c4"}),
    pytest.param(
        *("rpn", {"backbone": "timm/test_resnet", "row": "c4"}),
        marks=pytest.mark.skipif(not importlib.util.find_spec("timm"), reason="timm is not installed"),
    ),
]


@pytest.mark.parametrize(("task", "changes"), CASES, ids=str)
def test_fast_is_plain_to_the_last_digits_of_fp64(double, plain, task, changes):
    model = plain(task, **changes)
    fast = optimise(copy.deepcopy(model), CPU)
    assert modules_of_ops(fast) and not modules_of_ops(model)
    expected = compare(fast, model, 1e-9, (64, 64) if "backbone" in changes else SIDES)
    assert all(value.isfinite().all() for value in expected.values())
    assert len(expected["proposals 2" if model.rpn else "detections 3"].nonzero()) > 10
    assert ("detections 4" in expected) == (task in MASKS)


@pytest.mark.parametrize(("task", "row"), [("rpn", "fpn"), *(("joint", row) for row in ROWS)])
def test_fast_is_plain_in_fp32(plain, task, row):
    model = plain(task, row)
    compare(optimise(copy.deepcopy(model), CPU), model, 1e-3)


@pytest.mark.parametrize("row", ROWS)
def test_the_variants_for_a_gpu_compute_the_same(double, plain, row):
    model = plain("joint", row)
    fast = optimise(copy.deepcopy(model), CUDA)
    assert fast.rpn.one_nms
    compare(fast, model, 1e-9)


def test_every_way_to_save_time_is_taken(plain, monkeypatch):
    calls = Counter()

    def count(owner, name, what, takes=lambda *arguments: True):
        function = getattr(owner, name)

        def counted(*arguments, **options):
            calls[what] += takes(*arguments)
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, counted)

    count(sparse_conv.LazyMap, "at", "cells of a lazy map", lambda x, cell: len(cell) <= 2 * 9 * 8)
    count(sparse_conv.LazyMap, "dense", "whole lazy map")
    count(rpn, "_head_at", "head at samples")
    count(rpn.FastRPN, "select", "NMS")
    count(rpn.FastRPN, "_select", "tries of NMS")
    count(roi_align, "roi_align", "RoIAlign")
    count(onednn, "_multiply", "product")
    count(onednn._Product, "apply", "1x1 convolution", lambda x, *_: x.dim() == 4)
    count(box_head, "_flat_linear", "box head in channels_last", lambda x, *_: not x.is_contiguous())
    count(fold_batch_norm.FoldedConv2d, "forward", "folded batch norm")
    results(optimise(plain("rpn"), CPU))
    assert (calls["cells of a lazy map"], calls["whole lazy map"]) == (2, 0)  # P2 and P3; the others are small
    assert (calls["tries of NMS"] > calls["NMS"] == 1) and calls["head at samples"] == 1
    assert min(calls["product"], calls["1x1 convolution"], calls["folded batch norm"]) > 0
    calls.clear()
    results(optimise(plain("rpn", rpn={"shared": False}), CPU))
    assert (calls["cells of a lazy map"], calls["whole lazy map"], calls["head at samples"]) == (2, 0, 5)
    results(optimise(plain("joint"), CPU))
    assert calls["cells of a lazy map"] == 2  # a second stage reads whole maps
    assert min(calls["RoIAlign"], calls["box head in channels_last"]) == 2


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_names_parameters_and_state_dict_stay(plain, device):
    model = plain("joint", "c4")
    states, names, parameters = list(model.state_dict()), [n for n, _ in model.named_modules()], dict(model.named_parameters())
    assert optimise(model, device) is model and modules_of_ops(model)
    assert (list(model.state_dict()), [n for n, _ in model.named_modules()]) == (states, names)
    assert all(p is parameters.pop(name) for name, p in model.named_parameters()) and not parameters


class Head(RPNHead):
    """Computes something else with the same parameters."""

    def forward(self, features):
        objectness, deltas = super().forward({name: x + 1 for name, x in features.items()})
        return [2 * x for x in objectness], deltas


class BoxHead(TwoFC):
    def forward(self, x):
        return super().forward(x) + 1


class Neck(FPN):
    """Does more with the maps of `final_convs` than return them."""

    def forward(self, features):
        out = super().forward(features)
        return {name: 2 * x + 1 for name, x in out.items()}


@pytest.mark.parametrize("task", ["rpn", "joint"])
def test_parts_that_are_derived_from_ours_keep_their_own_way(double, plain, task):
    model = plain(task)
    neck = Neck(model.backbone.levels, fpn_config(channels=16))
    neck.load_state_dict(model.neck.state_dict())
    model.neck = neck.to(memory_format=torch.channels_last)
    fast = optimise(copy.deepcopy(model), CPU)
    compare(fast, model, 1e-9)
    assert type(fast.neck) is Neck and not any(isinstance(m, sparse_conv.LazyConv2d) for m in fast.modules())
    model.rpn.head = variant(model.rpn.head, Head)
    if model.roi:
        model.roi.box_head = variant(model.roi.box_head, BoxHead)
    fast = optimise(copy.deepcopy(model), CPU)
    compare(fast, model, 1e-9)
    assert (type(fast.rpn), type(fast.rpn.head)) == (rpn.FastRPN, Head)
    assert model.roi is None or type(fast.roi.box_head) is BoxHead


@pytest.mark.parametrize(
    "keys", [{"kernel_size": 1}, {"kernel_size": 3, "dilation": 2, "padding": 2}, {"kernel_size": 3, "groups": 2, "padding": 1}]
)
def test_a_final_convolution_of_another_kind_is_not_lazy(double, plain, keys):
    model = plain("rpn")
    model.neck.smooth["p2"] = nn.Conv2d(16, 16, **keys)
    fast = optimise(copy.deepcopy(model), CPU)
    compare(fast, model, 1e-9)
    lazy = [name for name, m in fast.neck.smooth.items() if isinstance(m, sparse_conv.LazyConv2d)]
    assert lazy == ["p3", "p4", "p5"]

"""Summary of a row: its cost by part, counted in another way."""

import pytest
import torch
from settings import JOINT
from torch import nn

from fpn_ablate.model.build import build_detector
from fpn_ablate.model.init import initialise
from fpn_ablate.model.summary import CLASSES, ROIS, cost_by_part, row_facts

SIZE = (72, 104)


def operations(module: nn.Module, *inputs) -> tuple[object, int]:
    """A module's output, and 2 per multiply-add of its convolutions and linear layers from the sizes of what they put out."""
    counts = []

    def hook(layer, inputs, out):
        # A transposed convolution works for each pixel that it reads.
        sites = inputs[0] if isinstance(layer, nn.ConvTranspose2d) else out
        counts.append(2 * sites.numel() * layer.weight[0].numel())

    layers = [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)]
    handles = [m.register_forward_hook(hook) for m in layers]
    out = module(*inputs)
    for handle in handles:
        handle.remove()
    return out, sum(counts)


@pytest.mark.parametrize(
    "overrides",
    [("ablation=fpn",), ("ablation=fpn", "neck.upsample=deconv"), ("ablation=c4",), ("ablation=c5",), ("ablation=finest",)],
)
def test_the_cost_of_each_part_is_that_of_its_layers_at_work(config, overrides):
    """On real tensors with real RoIs, by hooks on the layers; where the verifier has shapes alone and torch's counter."""
    cfg = config(*overrides, *JOINT)
    model = build_detector(cfg, num_classes=CLASSES)
    initialise(model, 0)
    model.eval()
    low = torch.rand(1, ROIS, 2, generator=torch.Generator().manual_seed(0)) * 50
    with torch.no_grad():
        features, backbone = operations(model.backbone, torch.rand(1, 3, *SIZE))
        levels, neck = operations(model.neck, features)
        (_, _, made), rpn = operations(model.rpn, levels)
        _, head = operations(model.roi, levels, torch.cat([low, low + 20], -1))
    with torch.device("meta"):
        shapes = build_detector(cfg, num_classes=CLASSES)
        costs, anchor_count = cost_by_part(shapes.eval(), SIZE)
    assert costs == {"backbone": backbone, "neck": neck, "rpn": rpn, "head": head, "mask": 0}
    assert anchor_count == sum(map(len, made))
    facts = row_facts(cfg, size=SIZE)
    assert facts.gflops == pytest.approx(sum(costs.values()) / 1e9, abs=0.0051)
    assert facts.gflops_head == pytest.approx(head / 1e9, abs=0.0051)
    assert facts.params == sum(p.numel() for p in model.parameters())
    assert facts.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("row", ["fpn", "c4"])
def test_networks_that_share_nothing_cost_what_both_cost(config, row):
    rpn = row_facts(config(f"ablation={row}"))
    fast = row_facts(config(f"ablation={row}", "task=fast_rcnn"))
    both, joint, four_step = (
        row_facts(config(f"ablation={row}", "task=faster_rcnn", f"task.training={training}"))
        for training in ("separate", "joint", "four_step")
    )
    for key in ("params", "trained", "anchors", "gflops", "gflops_backbone", "gflops_neck", "gflops_rpn", "gflops_head"):
        assert getattr(both, key) == pytest.approx(getattr(rpn, key) + getattr(fast, key), abs=0.03), key
    assert joint == four_step
    assert fast.gflops_rpn == fast.anchors == rpn.gflops_head == 0
    assert (joint.gflops_rpn, joint.gflops_head, joint.anchors) == (rpn.gflops_rpn, fast.gflops_head, rpn.anchors)
    assert (joint.gflops_backbone, joint.gflops_neck) == (rpn.gflops_backbone, rpn.gflops_neck)
    assert both.gflops_backbone > 1.9 * joint.gflops_backbone
    assert joint.params < both.params


@pytest.mark.parametrize(
    ("overrides", "head", "proposals"),
    [
        (("ablation=fpn",), "", ""),
        (("ablation=c4", "task=fast_rcnn"), "conv5", "RPN {Pk}"),
        (("ablation=c5", "task=fast_rcnn"), "2fc", "RPN {Pk}"),
        (("ablation=c4", "task=fast_rcnn", "task.roi.head=2fc"), "2fc", "RPN {Pk}"),
        (("ablation=fpn", "task=fast_rcnn", "task.proposals.neck.output=p2"), "2fc", "RPN P2"),
        (("ablation=fpn", "task=fast_rcnn", "task.proposals.file=mine.npz"), "2fc", "file"),
        (("ablation=c4", "task=faster_rcnn"), "conv5", "RPN C4"),
        (("ablation=c5", "task=faster_rcnn"), "2fc", "RPN C5"),
        (("ablation=fpn", "task=faster_rcnn"), "2fc", "RPN {Pk}"),
        (("ablation=finest", *JOINT), "2fc", "RPN P2"),
    ],
)
def test_head_and_proposals_are_called_as_in_the_paper(config, overrides, head, proposals):
    facts = row_facts(config(*overrides), size=(64, 64))
    assert (facts.head, facts.proposals) == (head, proposals)


def test_size_and_classes_count(config):
    cfg = config(*JOINT)
    small, wide = (row_facts(cfg, size=(256, width)) for width in (256, 512))
    many = row_facts(cfg, size=(256, 256), num_classes=2 * CLASSES)
    assert wide.anchors == 2 * small.anchors
    assert wide.gflops_backbone == pytest.approx(2 * small.gflops_backbone, abs=0.016)
    assert wide.gflops_head == small.gflops_head  # as many RoIs
    assert many.params - small.params == 5 * CLASSES * (cfg.task.roi.fc_dim + 1)


def test_the_neck_adds_far_more_than_5_percent_and_the_whole_is_far_cheaper_than_c4(config):
    """The reference figures (46, 63, 164 and 814 GMAC) are those of the first ResNet, which strides in a 1x1; torchvision's
    strides in the 3x3 behind it and has 6 % more to do in the trunk, 10 % in conv5 as a head."""
    fpn, c4 = (row_facts(config("recipe=paper2017", f"ablation={row}", *JOINT), size=(800, 1024)) for row in ("fpn", "c4"))
    assert fpn.gflops_neck / 2 == pytest.approx(46, rel=0.02)
    assert fpn.gflops_backbone / 2 == pytest.approx(1.06 * 63, rel=0.005)
    assert fpn.gflops / 2 == pytest.approx(164 + 0.06 * 63, rel=0.01)
    assert c4.gflops / 2 == pytest.approx(1.1 * 814, rel=0.01)
    assert fpn.gflops_neck > 0.6 * fpn.gflops_backbone

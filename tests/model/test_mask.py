"""The mask branch: its losses and masks against loops over RoIs, and each of its switches."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import roi_align

from fpn_ablate.model.build import build_detector
from fpn_ablate.model.heads.mask_head import FCN
from fpn_ablate.model.init import initialise
from fpn_ablate.model.summary import row_facts
from fpn_ablate.structures.instances import Proposals, Targets
from fpn_ablate.structures.masks import ObjectMasks
from fpn_ablate.utils import rle

JOINT = ("task=mask_rcnn", "task.training=joint")
ROWS = {
    "fpn": (),
    "c4": ("ablation=c4",),
    "mlp": ("ablation=masks/mlp",),
    "mlp on c4": ("ablation=c4", "task.mask.head=mlp", "task.roi.conv5_resolution=7"),
    "roi_pool": ("ablation=masks/roi_pool",),
    "agnostic": ("task.mask.class_agnostic=true",),
    "shallow": ("task.mask.convolutions=1", "task.mask.resolution=7"),
}
SIZES = [(64, 96), (50, 70)]
each_row = pytest.mark.parametrize("row", ROWS)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def batch():
    """Two images; the objects are discs in their boxes."""
    images = torch.randint(0, 256, (2, 3, *SIZES[0]), generator=generator(), dtype=torch.uint8)
    gt = torch.tensor([[[4.0, 4, 12, 12], [20, 20, 40, 40], [0, 0, 60, 60]], [[30, 8, 42, 24], [0, 0, 0, 0], [0, 0, 0, 0]]])
    valid = torch.tensor([[True, True, True], [True, False, False]])
    masks = []
    for (height, width), boxes, real in zip(SIZES, gt.tolist(), valid, strict=True):
        y, x = np.ogrid[:height, :width]
        discs = [
            ((2 * x - x1 - x2) / (x2 - x1)) ** 2 + ((2 * y - y1 - y2) / (y2 - y1)) ** 2 <= 1
            for x1, y1, x2, y2 in boxes[: real.sum()]
        ]
        masks.append(ObjectMasks(rle.encode(np.stack(discs)), (height, width), (height, width)))
    labels, crowd = torch.tensor([[1, 2, 3], [2, 0, 0]]), torch.zeros_like(valid)
    return images, Targets(gt, labels, valid, crowd, torch.tensor(SIZES), masks)


def proposals(near=True):
    """Ten around each object, or ten of an image that hold none."""
    _, targets = batch()
    boxes = targets.boxes.repeat(1, 10, 1) if near else torch.tensor([5.0, 40, 15, 48]).expand(2, 10, 4)
    boxes = boxes + near * torch.randn(boxes.shape, generator=generator(1))
    valid = targets.valid.repeat(1, 10) if near else torch.ones(2, 10, dtype=torch.bool)
    return Proposals(boxes * valid[..., None], valid.float(), valid)


@pytest.fixture
def network(config):
    """`network("c4")`: the row with its second stage alone, with logits of every size."""

    def build(row="fpn", *more):
        model = build_detector(config(*JOINT, *ROWS[row], *more), num_classes=3, heads=("roi",))
        initialise(model, 0)
        for name, p in model.named_parameters():
            if ("predictor" in name or "logits" in name) and p.dim() > 1:
                nn.init.normal_(p, std=0.3, generator=generator(p.numel()))
        return model

    return build


def losses(model, boxes=None, targets=None):
    images, ours = batch()
    return model.losses(images, targets or ours, lambda purpose: generator(), boxes or proposals())


def mask_gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if name.startswith("roi.mask")}


@each_row
def test_every_parameter_gets_a_gradient(network, row):
    model = network(row)
    sum(losses(model).values()).backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert mask_gradients(model)


@each_row
def test_the_loss_is_the_mean_over_pixels_of_the_objects_class(network, row):
    """Positive by positive, each pooled by itself; on C4 through conv5 once more."""
    model = network(row).eval()
    images, targets = batch()
    features, roi = model.features(images, targets.sizes), model.roi
    rois, labels, matched_idxs, sampled_mask = roi.sample(proposals(), targets, generator())
    terms = []
    for n, s in (sampled_mask & (labels > 0)).nonzero().tolist():
        pooler = roi.mask.pooler or roi.pooler
        pooled = pooler({name: x[n : n + 1] for name, x in features.items()}, rois[n, s][None, None])
        logits = roi.mask.head(pooled if roi.mask.pooler else roi.box_head.stage(pooled))[0]
        assert len(logits) == (1 if row == "agnostic" else 3)
        bitmap = torch.from_numpy(rle.decode(targets.masks[n].counts, SIZES[n]))[matched_idxs[n, s], None, None].float()
        target = roi_align(bitmap, [rois[n, s][None]], logits.shape[-1], aligned=True)[0, 0] >= 0.5
        channel = 0 if row == "agnostic" else labels[n, s] - 1
        terms.append(F.binary_cross_entropy_with_logits(logits[channel], target.float()))
    assert len(terms) > 4
    ours = losses(model)
    torch.testing.assert_close(ours["mask"], torch.stack(terms).mean())
    parameters = [p for p in model.parameters() if p.requires_grad]
    found, expected = (
        torch.autograd.grad(loss, parameters, materialize_grads=True) for loss in (ours["mask"], torch.stack(terms).mean())
    )
    for mine, other in zip(found, expected, strict=True):
        assert float((mine - other).norm()) <= 1e-4 * float(other.norm())


@pytest.mark.parametrize("row", ["fpn", "c4", "mlp"])
def test_without_positives_the_loss_and_its_gradients_are_0(network, row):
    model, (_, targets) = network(row), batch()
    nothing = torch.zeros_like(targets.valid)
    empty = Targets(targets.boxes * 0, targets.labels * 0, nothing, nothing, targets.sizes, targets.masks)
    loss = losses(model, proposals(near=False), empty)["mask"]
    assert float(loss.detach()) == 0
    loss.backward()
    assert all(grad is not None and not grad.any() for grad in mask_gradients(model).values())


def test_a_class_that_no_positive_has_learns_nothing(network):
    model, (_, targets) = network(), batch()
    ones = Targets(targets.boxes, targets.valid.long(), targets.valid, targets.crowd, targets.sizes, targets.masks)
    losses(model, targets=ones)["mask"].backward()
    assert model.roi.mask.head.logits.weight.grad.flatten(1).any(1).tolist() == [True, False, False]


@pytest.mark.parametrize("row", ["fpn", "c4"])
def test_the_box_branch_is_the_same_bits_with_masks_as_without(network, row):
    """One sampling, and the same initial weights: what differs between such rows is what masks teach."""
    (with_masks, without), (images, targets) = (network(row), network(row, "task.mask=null")), batch()
    assert without.roi.mask is None and not any("mask" in name for name in without.state_dict())
    ours, boxes = losses(with_masks), losses(without)
    assert list(ours) == [*boxes, "mask"]
    assert all(torch.equal(ours[name], boxes[name]) for name in boxes)
    found, expected = (model.eval().detect(images, targets.sizes, proposals()) for model in (with_masks, without))
    assert expected.masks is None
    assert all(torch.equal(getattr(found, name), getattr(expected, name)) for name in ("boxes", "scores", "labels", "valid"))


@each_row
def test_masks_are_those_of_the_detected_boxes_and_classes(network, row):
    model = network(row).eval()
    images, targets = batch()
    with torch.no_grad():
        found = model.detect(images, targets.sizes, proposals())
        features, roi = model.features(images, targets.sizes), model.roi
        pooler = roi.mask.pooler or roi.pooler
        pooled = pooler(features, found.boxes)
        logits = roi.mask.head(pooled if roi.mask.pooler else roi.box_head.stage(pooled)).unflatten(0, found.valid.shape)
    side = {"shallow": 14, "mlp on c4": 8, "c4": 14, "roi_pool": 14}.get(row, 28)
    assert found.masks.shape == (*found.valid.shape, side, side) and not found.valid.all() and len(found.labels.unique()) > 2
    for n, d in found.valid.nonzero().tolist():
        channel = 0 if row == "agnostic" else found.labels[n, d] - 1
        torch.testing.assert_close(found.masks[n, d], logits[n, d, channel].sigmoid(), rtol=0, atol=1e-5)
    assert not found.masks[~found.valid].any()


def test_no_detection_has_no_mask(network):
    model, (images, targets) = network("fpn", "task.roi.score_thresh=1.0").eval(), batch()
    assert model.detect(images, targets.sizes, proposals()).masks.shape == (2, 0, 28, 28)


def test_the_targets_of_torchvision_are_shares_at_the_corner(network):
    (exact, shares), (_, targets) = (
        (network("fpn", f"task.mask.targets={k}").roi.mask for k in ("exact", "torchvision")),
        batch(),
    )
    image, objects = torch.tensor([0, 0, 1]), torch.tensor([2, 0, 0])
    boxes = torch.tensor([[1.0, 2, 50, 61], [3, 3, 20, 18], [28, 8, 44, 25]])
    where = targets.masks, image, objects, boxes, 28
    bitmaps = torch.stack([torch.from_numpy(rle.decode(targets.masks[n].counts, SIZES[n])[k]).float()[:50, :70]
                           for n, k in zip(image, objects, strict=True)])  # fmt: skip
    for branch, aligned in ((exact, True), (shares, False)):
        expected = roi_align(bitmaps[1:, None], [box[None] for box in boxes[1:]], 28, aligned=aligned)[:, 0]
        expected = (expected >= 0.5).float() if aligned else expected
        torch.testing.assert_close(branch.targets(*where)[1:], expected)
    assert set(exact.targets(*where).unique().tolist()) == {0, 1} and len(shares.targets(*where).unique()) > 2


def test_the_recipe_of_torchvision_chooses_its_targets(config):
    kinds = [config(f"recipe={name}", *JOINT).mask.targets for name in ("paper2017", "mask_rcnn2017", "torchvision")]
    assert kinds == ["exact", "exact", "torchvision"]


def test_initial_distributions(config):
    model = build_detector(config(*JOINT, "task.mask.channels=64", "neck.channels=64"), num_classes=50, heads=("roi",))
    initialise(model, 0)
    head = model.roi.mask.head
    assert isinstance(head, FCN) and len(head.convs) == 4
    assert float(head.logits.weight.detach().std()) == pytest.approx(0.001, rel=0.1)
    assert float(head.convs[2].weight.detach().std()) == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)
    assert float(head.deconv.weight.detach().std()) == pytest.approx((2 / (4 * 64)) ** 0.5, rel=0.05)
    assert not any(p.any() for name, p in head.named_parameters() if name.endswith("bias"))


def test_the_head_costs_what_the_papers_does(config):
    """2.64 million parameters and 0.53 GMAC a RoI."""
    with_masks, without = (
        row_facts(config("recipe=mask_rcnn2017", *JOINT, *more), size=(64, 64)) for more in ((), ("task.mask=null",))
    )
    assert (with_masks.mask, without.mask, without.gflops_mask) == ("fcn", "", 0)
    assert with_masks.params - without.params == 4 * (9 * 256**2 + 256) + 4 * 256**2 + 256 + 80 * 257
    assert with_masks.gflops_mask / 2 == pytest.approx(100 * 0.53, rel=0.01)
    assert with_masks.gflops == pytest.approx(without.gflops + with_masks.gflops_mask, abs=0.02)
    assert not {"mask", "gflops_mask"} & without.to_dict().keys()

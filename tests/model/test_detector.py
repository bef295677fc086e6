"""The parts put together: which losses a network has, who learns from what, and where proposals come from."""

import pytest
import torch
from settings import JOINT

from fpn_ablate.model.build import build_detector
from fpn_ablate.model.init import initialise
from fpn_ablate.structures.instances import Proposals, Targets

RPN_LOSSES, ROI_LOSSES = ["rpn_objectness", "rpn_box"], ["roi_class", "roi_box"]


@pytest.fixture
def network(config):
    """`network("rpn", "roi")`: these parts of row fpn, with the same weights each time."""

    def build(*heads, overrides=()):
        model = build_detector(config(*JOINT, *overrides), num_classes=3, heads=heads)
        initialise(model, 0)
        for name, p in model.named_parameters():
            if name.startswith(("rpn", "roi.predictor")) and p.dim() > 1:
                torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
        return model

    return build


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def generators(seed=0):
    """One generator for all purposes, as in training."""
    draw = generator(seed)
    return lambda purpose: draw


def batch():
    images = torch.randint(0, 256, (2, 3, 64, 96), generator=generator(), dtype=torch.uint8)
    gt = torch.tensor([[[4.0, 4, 9, 9], [20, 20, 40, 40], [0, 0, 60, 60]], [[30, 8, 42, 24], [0, 0, 0, 0], [0, 0, 0, 0]]])
    valid = torch.tensor([[True, True, True], [True, False, False]])
    sizes = torch.tensor([[64, 96], [50, 70]])
    return images, Targets(gt, torch.tensor([[1, 2, 3], [2, 0, 0]]), valid, torch.zeros_like(valid), sizes)


def some_proposals():
    corner, size = torch.rand(2, 2, 30, 2, generator=generator(1)) * 30
    return Proposals(torch.cat([corner, corner + size + 2], -1), torch.ones(2, 30), torch.ones(2, 30, dtype=torch.bool))


def values(losses):
    return {name: float(value.detach()) for name, value in losses.items()}


@pytest.mark.parametrize(
    ("parts", "names"), [(("rpn",), RPN_LOSSES), (("roi",), ROI_LOSSES), (("rpn", "roi"), RPN_LOSSES + ROI_LOSSES)]
)
def test_each_part_brings_its_losses_and_no_other(network, parts, names):
    model = network(*parts)
    images, targets = batch()
    losses = model.losses(images, targets, generators(), None if "rpn" in parts else some_proposals())
    assert list(losses) == names
    assert all(value > 0 for value in losses.values())
    assert (model.rpn is None, model.roi is None) == ("rpn" not in parts, "roi" not in parts)


def test_the_rpns_losses_are_the_same_bits_with_a_second_stage_as_without(network):
    images, targets = batch()
    alone, together = (values(network(*parts).losses(images, targets, generators())) for parts in (("rpn",), ("rpn", "roi")))
    assert alone == {name: together[name] for name in RPN_LOSSES}


def test_the_second_stage_learns_from_given_proposals_or_from_the_rpns_own(network):
    """Both agree where the given ones are the RPN's own."""
    model, (images, targets) = network("rpn", "roi"), batch()
    losses = values(model.losses(images, targets, generators()))
    same = model.propose(images, targets.sizes, to_train=True)
    assert values(model.losses(images, targets, generators(), same)) == losses
    other = values(model.losses(images, targets, generators(), some_proposals()))
    assert {name: other[name] for name in RPN_LOSSES} == {name: losses[name] for name in RPN_LOSSES}
    assert all(other[name] != losses[name] for name in ROI_LOSSES)


def test_an_rpn_makes_as_many_proposals_as_the_second_stage_reads_and_alone_as_many_as_it_may(network, monkeypatch):
    model, (images, targets) = network("rpn", "roi", overrides=("rpn.post_nms_topk=[70,50]",)), batch()
    read = []

    def count(method):
        return lambda features, proposals, *rest: read.append(proposals.boxes.shape[1]) or method(features, proposals, *rest)

    for name in ("losses", "detect"):
        monkeypatch.setattr(model.roi, name, count(getattr(model.roi, name)))
    model.losses(images, targets, generators())
    model.eval().detect(images, targets.sizes)
    assert read == [64, 32] == list(model.roi.config.proposals)
    made = [model.propose(images, targets.sizes, to_train) for to_train in (True, False)]
    assert [proposals.boxes.shape[1] for proposals in made] == [70, 50]


def test_proposals_are_needed_where_there_is_no_rpn(network):
    with pytest.raises(AssertionError, match="without an RPN needs proposals"):
        network("roi").losses(*batch(), generators())


@pytest.mark.parametrize("kind", ["rpn", "roi"])
def test_each_stages_losses_teach_backbone_and_neck_and_their_own_head_alone(network, kind):
    """Above all the second stage's do not reach the RPN through its proposals (approximate joint training)."""
    model, (images, targets) = network("rpn", "roi"), batch()
    losses = model.losses(images, targets, generators())
    sum(value for name, value in losses.items() if name.startswith(kind)).backward()
    reached = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {"backbone", "neck", kind}


def test_the_generator_alone_decides_the_losses(network):
    model, (images, targets) = network("rpn", "roi"), batch()
    torch.manual_seed(1)
    first = values(model.losses(images, targets, generators(5)))
    torch.manual_seed(2)
    assert values(model.losses(images, targets, generators(5))) == first
    assert values(model.losses(images, targets, generators(6))) != first


@pytest.mark.parametrize("overrides", [(), ("ablation=c4",), ("ablation=c5",)])
def test_detections_come_from_given_proposals_or_from_the_rpns_own(network, overrides):
    # With other numbers for training, so that it shows which of the two are asked for.
    overrides += ("rpn.pre_nms_topk=[400,15]", "rpn.pre_nms_topk_single=[400,50]")
    model, (images, targets) = network("rpn", "roi", overrides=overrides).eval(), batch()
    expected = model.detect(images, targets.sizes)
    proposals = model.propose(images, targets.sizes)
    assert not torch.equal(proposals.boxes, model.propose(images, targets.sizes, to_train=True).boxes[:, :32])
    same = model.detect(images, targets.sizes, proposals)
    assert expected.valid.any(1).all()
    alone = network("roi", overrides=overrides).eval().detect(images, targets.sizes, proposals)
    for name in ("boxes", "scores", "labels", "valid"):
        assert all(torch.equal(getattr(expected, name), getattr(other, name)) for other in (same, alone))
    other = model.detect(images, targets.sizes, some_proposals())
    assert not torch.equal(other.boxes, expected.boxes)


def test_what_lies_in_the_padding_does_not_matter_to_detections(network):
    model, (images, targets) = network("rpn", "roi").eval(), batch()
    other = images.clone()
    other[1, :, 50:] = 255
    other[1, :, :, 70:] = 255
    a, b = (model.detect(x, targets.sizes) for x in (images, other))
    assert torch.equal(a.boxes, b.boxes)
    assert torch.equal(a.scores, b.scores)


def test_neither_proposals_nor_detections_keep_a_graph(network):
    model, (images, targets) = network("rpn", "roi"), batch()
    for answer in (model.propose(images, targets.sizes), model.detect(images, targets.sizes)):
        assert not answer.boxes.requires_grad
        assert not answer.scores.requires_grad

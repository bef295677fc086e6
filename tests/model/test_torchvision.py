"""The same Mask R-CNN as torchvision's, with its random weights imported: every stage, every loss, every gradient. What is not
of masks is equal to its Faster R-CNN.

`recipe=torchvision` reproduces what theirs does otherwise, by choice or by slip: its anchors, its resizing, its box loss, its
targets of masks.
"""

import pytest
import torch
from networks import load
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNN, MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign
from torchvision_scene import CLASSES, LAST_NORM, batch_of, close, pictures, randomise, their_input

from fpn_ablate.data.transforms import to_native
from fpn_ablate.engine.train import batch_targets
from fpn_ablate.model import build
from fpn_ablate.model.heads import roi, rpn
from fpn_ablate.structures.masks import ObjectMasks
from fpn_ablate.utils import rle
from fpn_ablate.weights.names import TORCHVISION, to_ours

HIDDEN, MASK = 128, 16  # heads of 1024 units and 256 channels would take most of the time
PYRAMID = ["p2", "p3", "p4", "p5", "p6"]


def their_model(network, short_side, max_side, proposals, samples):
    """Random weights that make scores of every size, so that nothing ties, with activations that neither vanish nor grow."""
    scale = short_side / 800
    model = MaskRCNN(
        resnet_fpn_backbone(backbone_name=network, weights=None, trainable_layers=5),
        min_size=short_side,
        max_size=max_side,
        rpn_post_nms_top_n_train=2 * proposals,
        rpn_post_nms_top_n_test=proposals,
        rpn_anchor_generator=AnchorGenerator(tuple((s * scale,) for s in (32, 64, 128, 256, 512)), ((0.5, 1, 2),) * 5),
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2, canonical_scale=224 * scale),
        box_head=TwoMLPHead(256 * 49, HIDDEN),
        box_predictor=FastRCNNPredictor(HIDDEN, CLASSES + 1),
        mask_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], 14, 2, canonical_scale=224 * scale),
        mask_head=MaskRCNNHeads(256, (MASK,) * 4, 1),
        mask_predictor=MaskRCNNPredictor(MASK, MASK, CLASSES + 1),
    )
    randomise(model, LAST_NORM[network], ("cls_logits", "bbox_pred", "cls_score", "mask_fcn_logits"))
    return model


def our_model(config, path, network, short_side, max_side, proposals, samples):
    cfg = config(
        *("task=mask_rcnn", "task.training=joint", "recipe=torchvision", f"backbone={network}", "backbone.freeze_at=0"),
        *(f"recipe.short_side={short_side}", f"recipe.max_side={max_side}", f"recipe.roi.fc_dim={HIDDEN}"),
        *(f"{key}=[{2 * proposals},{proposals}]" for key in ("rpn.post_nms_topk", "recipe.roi.proposals")),
        *(f"task.mask.channels={MASK}", f"recipe.roi.samples={samples}"),
    )
    model = build.build_detector(cfg, num_classes=CLASSES)
    load(model, path)
    return model.eval(), cfg


def first_by_position(labels, count, fraction, generator=None):
    """In place of chance: (idxs (N, S), sampled_mask (N, S)) of the first positives and then the first negatives."""
    idxs = labels.new_zeros(len(labels), count, dtype=torch.int64)
    sampled_mask = torch.zeros(len(labels), count, dtype=torch.bool)
    for n, image_labels in enumerate(labels):
        positive = (image_labels >= 1).nonzero()[:, 0][: int(count * fraction)]
        drawn = torch.cat([positive, (image_labels == 0).nonzero()[:, 0][: count - len(positive)]])
        idxs[n, : len(drawn)], sampled_mask[n, : len(drawn)] = drawn, True
    return idxs, sampled_mask


class FirstByPosition:
    """The same for torchvision: masks of the positives and of the negatives of each image."""

    def __init__(self, count, fraction):
        self.count, self.fraction = count, fraction

    def __call__(self, labels):
        positives, negatives = [], []
        for image_labels in labels:
            idxs, sampled_mask = first_by_position(image_labels[None], self.count, self.fraction)
            drawn = torch.zeros(len(image_labels), dtype=torch.bool)
            drawn[idxs[sampled_mask]] = True
            positives.append(drawn & (image_labels >= 1))
            negatives.append(drawn & (image_labels == 0))
        return positives, negatives


# Network, short side, long side at most, proposals and samples an image; and images: one is enlarged, one reduced.
SMALL = ("resnet18", 80, 128, 50, 64), [(60, 80), (120, 90)]
FULL = ("resnet50", 800, 1333, 1000, 512), [(480, 640), (500, 375)]


EACH_SIZE = pytest.mark.parametrize("sides, sizes", [SMALL, pytest.param(*FULL, marks=pytest.mark.slow)], ids=["80", "800"])


@pytest.fixture
def scene(config, tmp_path):
    def make(sides, sizes):
        theirs = their_model(*sides).eval()
        torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
        ours, cfg = our_model(config, tmp_path / "theirs.pth", *sides)
        samples = list(pictures(*sizes))
        return theirs, ours, samples, batch_of(samples, cfg)

    return make


@EACH_SIZE
def test_features_objectness_and_deltas_are_torchvisions(scene, sides, sizes):
    theirs, ours, samples, batch = scene(sides, sizes)
    with torch.no_grad():
        inputs, _ = theirs.transform(their_input(samples)[0])
        assert [tuple(size) for size in batch.sizes.tolist()] == inputs.image_sizes
        levels = theirs.backbone(inputs.tensors)
        features = ours.features(batch.images, batch.sizes)
        for name, level in zip(PYRAMID, levels.values(), strict=True):
            close(features[name], level, 1e-4)
        raw, expected = ours.rpn(features), theirs.rpn.head(list(levels.values()))
    for objectness, deltas, (their_objectness, their_deltas) in zip(*raw[:2], zip(*expected, strict=True), strict=True):
        n, _, height, width = their_objectness.shape
        close(objectness, their_objectness.permute(0, 2, 3, 1).reshape(n, -1), 1e-4)
        close(deltas, their_deltas.view(n, 3, 4, height, width).permute(0, 3, 4, 1, 2).reshape(n, -1, 4), 1e-4)
    close(torch.cat(raw[2]), theirs.rpn.anchor_generator(inputs, list(levels.values()))[0], 0)


@EACH_SIZE
@torch.no_grad()
def test_proposals_scores_detections_and_masks_are_torchvisions(sides, sizes, double, scene):
    theirs, ours, samples, batch = scene(sides, sizes)
    images, _ = their_input(samples)
    inputs, _ = theirs.transform(images)
    levels = theirs.backbone(inputs.tensors)
    features = ours.features(batch.images, batch.sizes)

    boxes, _ = theirs.rpn(inputs, levels)
    proposals = ours.rpn.propose(*ours.rpn(features), batch.sizes, to_train=False)
    for n, expected_boxes in enumerate(boxes):
        close(proposals.boxes[n][proposals.valid[n]], expected_boxes, 1e-5)

    rois = theirs.roi_heads.box_head(theirs.roi_heads.box_roi_pool(levels, boxes, inputs.image_sizes))
    expected, their_deltas = theirs.roi_heads.box_predictor(rois)
    scores, deltas = ours.roi(features, proposals.boxes)
    close(scores[proposals.valid], expected, 1e-5)
    close(deltas[proposals.valid], their_deltas.view(-1, CLASSES + 1, 4)[:, 1:], 1e-5)

    detections = ours.roi.detect(features, proposals, batch.sizes)
    in_boxes, _ = theirs.roi_heads(levels, boxes, inputs.image_sizes)  # not pasted yet
    for n, expected in enumerate(in_boxes):
        close(detections.masks[n][detections.valid[n]], expected["masks"][:, 0], 1e-5)
        assert expected["masks"].std() > 1e-2  # far more than what may differ
    for n, (sample, expected) in enumerate(zip(samples, theirs(images), strict=True)):
        keep = detections.valid[n]
        assert len(expected["labels"]) > 20
        assert detections.labels[n][keep].tolist() == expected["labels"].tolist()
        close(detections.scores[n][keep], expected["scores"], 1e-5)
        close(to_native(detections.boxes[n][keep], batch.sizes[n].tolist(), sample.image.shape[:2]), expected["boxes"], 1e-5)


@EACH_SIZE
def test_losses_and_gradients_are_torchvisions_on_the_same_samples(sides, sizes, monkeypatch, double, scene):
    theirs, ours, samples, batch = scene(sides, sizes)
    for module in (rpn, roi):
        monkeypatch.setattr(module, "sample", first_by_position)
    theirs.rpn.fg_bg_sampler, theirs.roi_heads.fg_bg_sampler = FirstByPosition(256, 0.5), FirstByPosition(sides[-1], 0.25)
    inputs, resized = theirs.transform(*their_input(samples))
    # A difference of 1e-7 would flip ReLUs now and then, of the many at 800 px.
    close(ours.backbone.normalise(batch.images, batch.sizes), inputs.tensors, 1e-12)
    # Theirs resizes masks to the input, by the nearest pixel, before it cuts them to RoIs.
    batch.masks = [
        ObjectMasks(rle.encode(target["masks"].numpy()), size, size)
        for target, size in zip(resized, inputs.image_sizes, strict=True)
    ]
    expected = theirs.train()(*their_input(samples))
    sum(expected.values()).backward()  # now: at 800 px both networks' activations would take 20 GB
    gradients = {to_ours(TORCHVISION, name): p.grad for name, p in theirs.named_parameters()}
    for name in ("weight", "bias"):  # of the background's box deltas and mask, which ours lacks and nothing reads
        gradients[f"roi.predictor.deltas.{name}"] = gradients[f"roi.predictor.deltas.{name}"][4:]
        gradients[f"roi.mask.head.logits.{name}"] = gradients[f"roi.mask.head.logits.{name}"][1:]
    losses = ours.train().losses(batch.images, batch_targets(batch), lambda purpose: torch.Generator())
    names = {
        "rpn_objectness": "objectness",
        "rpn_box": "rpn_box_reg",
        "roi_class": "classifier",
        "roi_box": "box_reg",
        "mask": "mask",
    }
    assert set(losses) == set(names)
    for name, theirs_name in names.items():
        assert losses[name].item() == pytest.approx(expected[f"loss_{theirs_name}"].item(), rel=1e-6), name
    sum(losses.values()).backward()
    assert set(gradients) == {name for name, _ in ours.named_parameters()}
    for name, p in ours.named_parameters():
        assert float((p.grad - gradients[name]).norm()) <= 1e-6 * float(gradients[name].norm()), name

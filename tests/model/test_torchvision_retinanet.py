"""The same RetinaNet as torchvision's, both versions, with their random weights imported: every stage, loss and gradient."""

from functools import partial

import pytest
import torch
from networks import load
from torch import nn
from torchvision.models import resnet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.retinanet import RetinaNet, RetinaNetHead, _default_anchorgen
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision_scene import CLASSES, LAST_NORM, batch_of, close, pictures, randomise, same_detections, their_input

from fpn_ablate.engine.train import batch_targets
from fpn_ablate.model import build
from fpn_ablate.model.anchors import cell_anchors
from fpn_ablate.model.heads.retinanet import octave_sizes
from fpn_ablate.weights.names import RETINANET, to_ours

VERSIONS = {"v1": "retinanet/torchvision", "v2": "retinanet/torchvision_v2"}
SMALL = ("resnet18", 96, 160, 64), [(60, 80), (120, 90)]
FULL = ("resnet50", 800, 1333, 256), [(480, 640), (500, 375)]
EACH = pytest.mark.parametrize(
    "version, sides, sizes",
    [
        ("v1", *SMALL),
        pytest.param("v2", *SMALL, marks=pytest.mark.slow),
        pytest.param("v1", *FULL, marks=pytest.mark.slow),
        pytest.param("v2", *FULL, marks=pytest.mark.slow),
    ],
)
SCORES = {"v1": 0.7, "v2": 0.6}  # random weights give each anchor a score
NEVER = -30.0  # bias of the score of background, which theirs has and never trains


def rows_of_ours(x):
    """From their rows of scores or deltas (9 * K, ...), ratio by ratio, to ours, size by size: (3, 3, K, ...)."""
    return x.unflatten(0, (3, 3, -1)).transpose(0, 1)


def their_model(version, network, short_side, max_side, width):
    second, stages = version == "v2", [64 * 2**k * (1 if network == "resnet18" else 4) for k in range(4)]
    body = resnet.__dict__[network](weights=None, norm_layer=FrozenBatchNorm2d)
    backbone = BackboneWithFPN(
        body,
        {f"layer{k}": str(k - 2) for k in (2, 3, 4)},
        stages[1:],
        width,
        LastLevelP6P7(stages[-1] if second else width, width),
    )
    sizes = tuple(tuple(map(int, octave_sizes(s * short_side / 800, 3, round_down=True))) for s in (32, 64, 128, 256, 512))
    model = RetinaNet(
        backbone,
        CLASSES + 1,
        min_size=short_side,
        max_size=max_side,
        anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5),
        head=RetinaNetHead(width, 9, CLASSES + 1, norm_layer=partial(nn.GroupNorm, width // 8) if second else None),
        score_thresh=SCORES[version],
    )
    model.head.regression_head._loss_type = "giou" if second else "l1"
    randomise(model, LAST_NORM[network], ("cls_logits", "bbox_reg"))
    model.head.classification_head.cls_logits.bias.data.view(9, -1)[:, 0] = NEVER
    return model


@pytest.fixture
def scene(config, tmp_path):
    def make(version, sides, sizes):
        theirs = their_model(version, *sides).eval()
        torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
        network, short_side, max_side, width = sides
        cfg = config(
            *("task=retinanet", "recipe=torchvision", f"ablation={VERSIONS[version]}", f"backbone={network}"),
            *(f"neck.channels={width}", "backbone.freeze_at=0", f"task.score_thresh={SCORES[version]}"),
            *(f"recipe.short_side={short_side}", f"recipe.max_side={max_side}"),
        )
        ours = build.build_detector(cfg, num_classes=CLASSES)
        load(ours, tmp_path / "theirs.pth")
        samples = list(pictures(*sizes))
        return theirs, ours.eval(), samples, batch_of(samples, cfg)

    return make


@EACH
@torch.no_grad()
def test_features_logits_deltas_and_anchors_are_torchvisions(scene, version, sides, sizes):
    theirs, ours, samples, batch = scene(version, sides, sizes)
    inputs, _ = theirs.transform(their_input(samples)[0])
    levels = theirs.backbone(inputs.tensors)
    features = ours.features(batch.images, batch.sizes)
    assert list(features) == ["p3", "p4", "p5", "p6", "p7"]
    for feature, level in zip(features.values(), levels.values(), strict=True):
        close(feature, level, 1e-4)
    expected, (logits, deltas) = theirs.head(list(levels.values())), ours.head(features)
    anchors = theirs.anchor_generator(inputs, list(levels.values()))[0]
    for ours_of, theirs_of in (
        (torch.cat(logits, 1), expected["cls_logits"][..., 1:]),
        (torch.cat(deltas, 1), expected["bbox_regression"]),
        (torch.cat(ours.head.anchors(features))[None], anchors[None]),
    ):
        n, _, k = theirs_of.shape
        close(ours_of, theirs_of.view(n, -1, 3, 3, k).transpose(2, 3).reshape(n, -1, k), 1e-4)


@EACH
def test_detections_losses_and_gradients_are_torchvisions(scene, double, version, sides, sizes):
    theirs, ours, samples, batch = scene(version, sides, sizes)
    same_detections(theirs, ours, samples, batch, most=300)
    same_losses_and_gradients(theirs, ours, samples, batch)


def same_losses_and_gradients(theirs, ours, samples, batch):
    expected = theirs.train()(*their_input(samples))
    sum(expected.values()).backward()
    gradients = {to_ours(RETINANET, name): p.grad for name, p in theirs.named_parameters()}
    for leaf in ("weight", "bias"):
        gradients[f"head.scores.{leaf}"] = rows_of_ours(gradients[f"head.scores.{leaf}"])[:, :, 1:].flatten(0, 2)
        gradients[f"head.deltas.{leaf}"] = rows_of_ours(gradients[f"head.deltas.{leaf}"]).flatten(0, 2)
    losses = ours.train().losses(batch.images, batch_targets(batch), lambda purpose: torch.Generator())
    assert losses["class"].item() == pytest.approx(expected["classification"].item(), rel=1e-6)
    assert losses["box"].item() == pytest.approx(expected["bbox_regression"].item(), rel=1e-6)
    sum(losses.values()).backward()
    assert set(gradients) == {name for name, _ in ours.named_parameters()}
    for name, p in ours.named_parameters():
        assert float((p.grad - gradients[name]).norm()) <= 1e-6 * float(gradients[name].norm()), name


def test_anchors_of_a_cell_are_torchvisions_at_its_own_size():
    for base, theirs in zip((32, 64, 128, 256, 512), _default_anchorgen().cell_anchors, strict=True):
        ours = cell_anchors(octave_sizes(base, 3, round_down=True), (0.5, 1, 2), round_to_pixels=True)
        assert torch.equal(ours, theirs.view(3, 3, 4).transpose(0, 1).reshape(9, 4))

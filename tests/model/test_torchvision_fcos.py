"""The same FCOS as torchvision's, with its random weights imported: every stage, loss and gradient."""

import pytest
import torch
from networks import load
from torch import nn
from torchvision.models import resnet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.fcos import FCOS as TheirFCOS
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision_scene import CLASSES, LAST_NORM, batch_of, close, pictures, randomise, same_detections, their_input

from fpn_ablate.engine.train import batch_targets
from fpn_ablate.model import build
from fpn_ablate.utils.errors import UserError
from fpn_ablate.weights.convert import COCO_UNUSED, convert
from fpn_ablate.weights.files import Stored
from fpn_ablate.weights.names import FCOS, to_ours

SMALL = ("resnet18", 96, 160, 64), [(60, 80), (120, 90)]
FULL = ("resnet50", 800, 1333, 256), [(480, 640), (500, 375)]
EACH = pytest.mark.parametrize("sides, sizes", [SMALL, pytest.param(*FULL, marks=pytest.mark.slow)], ids=["96", "800"])
SCORE = 0.545  # random weights give each location a score
NEVER = -30.0  # bias of the score of background, which theirs has and never trains


def their_model(network, short_side, max_side, width):
    stages = [64 * 2**k * (1 if network == "resnet18" else 4) for k in range(4)]
    body = resnet.__dict__[network](weights=None, norm_layer=FrozenBatchNorm2d)
    layers = {f"layer{k}": str(k - 2) for k in (2, 3, 4)}
    backbone = BackboneWithFPN(body, layers, stages[1:], width, LastLevelP6P7(width, width))
    model = TheirFCOS(backbone, CLASSES + 1, min_size=short_side, max_size=max_side, score_thresh=SCORE)
    for module in model.head.modules():
        if isinstance(module, nn.GroupNorm):
            module.num_groups = width // 8
    randomise(model, LAST_NORM[network], ("cls_logits", "bbox_reg", "bbox_ctrness"))
    model.head.classification_head.cls_logits.bias.data[0] = NEVER
    return model


@pytest.fixture
def scene(config, tmp_path):
    def make(sides, sizes):
        theirs = their_model(*sides).eval()
        torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
        network, short_side, max_side, width = sides
        cfg = config(
            *("recipe=torchvision", "ablation=fcos/torchvision", f"backbone={network}", "backbone.freeze_at=0"),
            *(f"neck.channels={width}", f"task.score_thresh={SCORE}", f"task.range={8 * 800 / short_side}"),
            *(f"recipe.short_side={short_side}", f"recipe.max_side={max_side}"),
        )
        ours = build.build_detector(cfg, num_classes=CLASSES)
        notes = load(ours, tmp_path / "theirs.pth")
        assert "use it with ablation=fcos/torchvision" in notes
        samples = list(pictures(*sizes))
        return theirs, ours.eval(), samples, batch_of(samples, cfg)

    return make


@EACH
@torch.no_grad()
def test_features_logits_distances_and_centerness_are_torchvisions(scene, sides, sizes):
    theirs, ours, samples, batch = scene(sides, sizes)
    inputs, _ = theirs.transform(their_input(samples)[0])
    levels = theirs.backbone(inputs.tensors)
    features = ours.features(batch.images, batch.sizes)
    assert list(features) == ["p3", "p4", "p5", "p6", "p7"]
    for feature, level in zip(features.values(), levels.values(), strict=True):
        close(feature, level, 1e-4)
    expected, raw = theirs.head(list(levels.values())), ours.head(features)
    expected["cls_logits"] = expected["cls_logits"][..., 1:]
    for ours_of, name in zip(raw, ("cls_logits", "bbox_regression", "bbox_ctrness"), strict=True):
        close(torch.cat(ours_of, 1), expected[name], 1e-4)
    squares = theirs.anchor_generator(inputs, list(levels.values()))[0]
    close(ours.head.locations(features).points, (squares[:, :2] + squares[:, 2:]) / 2, 0)


@EACH
def test_detections_losses_and_gradients_are_torchvisions(scene, double, sides, sizes):
    theirs, ours, samples, batch = scene(sides, sizes)
    same_detections(theirs, ours, samples, batch, most=100)
    expected = theirs.train()(*their_input(samples))
    sum(expected.values()).backward()
    gradients = {to_ours(FCOS, name): p.grad for name, p in theirs.named_parameters()}
    for leaf in ("weight", "bias"):
        gradients[f"head.scores.{leaf}"] = gradients[f"head.scores.{leaf}"][1:]
    losses = ours.train().losses(batch.images, batch_targets(batch), lambda purpose: torch.Generator())
    for name, their_name in {"class": "classification", "box": "bbox_regression", "centerness": "bbox_ctrness"}.items():
        assert losses[name].item() == pytest.approx(expected[their_name].item(), rel=1e-6), name
    sum(losses.values()).backward()
    assert set(gradients) == {name for name, _ in ours.named_parameters()}
    for name, p in ours.named_parameters():
        assert float((p.grad - gradients[name]).norm()) <= 1e-6 * float(gradients[name].norm()), name


def test_coco_has_80_of_its_91_rows_and_other_rows_are_refused(tmp_path):
    torch.manual_seed(0)
    state = their_model("resnet18", 96, 160, 32).state_dict()
    for leaf, shape in (("weight", (91, 32, 3, 3)), ("bias", (91,))):
        state[f"head.classification_head.cls_logits.{leaf}"] = torch.rand(shape)
    weights = convert(Stored(tmp_path / "coco.pth", state))
    kept = [row for row in range(1, 91) if row not in COCO_UNUSED]
    assert weights.facts["num_classes"] == "80"
    assert torch.equal(weights.tensors["head.scores.bias"], state["head.classification_head.cls_logits.bias"][kept])
    state["head.regression_head.bbox_reg.bias"] = torch.rand(6)
    with pytest.raises(UserError, match="its head has the wrong rows"):
        convert(Stored(tmp_path / "coco.pth", state))

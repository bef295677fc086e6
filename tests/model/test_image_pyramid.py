"""Image pyramid: with one scale it is the plain detector; with several, plain detectors at each scale put together by hand."""

from dataclasses import astuple

import pytest
import torch
import torch.nn.functional as F
from settings import JOINT
from torchvision.ops import nms

from fpn_ablate.model import boxes
from fpn_ablate.model.build import build_detector
from fpn_ablate.model.detectors.image_pyramid import ImagePyramid, anchor_sizes_read, nearest_scales
from fpn_ablate.model.detectors.two_stage import Detector
from fpn_ablate.model.init import initialise
from fpn_ablate.model.summary import CLASSES, cost_by_part, row_facts
from fpn_ablate.structures.images import resize
from fpn_ablate.structures.instances import Targets
from fpn_ablate.utils.errors import UserError
from fpn_ablate.utils.seeding import torch_generator

SIZES = (32, 64, 128, 256, 512)
SCALES = (0.5, 1, 2)
TASKS = {"rpn": (), "joint": JOINT}
NUMBERS = ("rpn.pre_nms_topk=[60,50]", "rpn.post_nms_topk=[80,40]", "recipe.antialias=false")


@pytest.fixture
def network(config):
    """`network("joint", scales=(1,), roi="nearest")` -> a detector with the same weights each time; scales None: no pyramid."""

    def build(task="joint", row="image_pyramid", scales=SCALES, numbers=NUMBERS, **keys) -> ImagePyramid | Detector:
        sure = ("task.roi.score_thresh=0.01", "task.roi.conv5_resolution=6") if task == "joint" else ()
        cfg = config(f"ablation={row}", *TASKS[task], *numbers, *sure)
        pyramid = None
        if scales:
            changes = {"scales": scales, "box_size": 224.0} | keys
            pyramid = config("ablation=image_pyramid").image_pyramid.model_copy(update=changes)
        model = build_detector(cfg.model_copy(update={"image_pyramid": pyramid}), num_classes=3)
        initialise(model, 0)
        for name, p in model.named_parameters():
            if name.startswith(("rpn", "roi.predictor")) and p.dim() > 1:
                torch.nn.init.normal_(p, std=0.2, generator=torch_generator(0, name))
        return model

    return build


def batch(height=64, width=96):
    images = torch.randint(0, 256, (2, 3, height, width), generator=torch_generator(0, "images"), dtype=torch.uint8)
    gt = torch.tensor([[[4.0, 4, 9, 9], [20, 20, 40, 40], [0, 0, 60, 60]], [[30, 8, 42, 24], [0, 0, 0, 0], [0, 0, 0, 0]]])
    valid = torch.tensor([[True, True, True], [True, False, False]])
    sizes = torch.tensor([[height, width], [height - 14, width - 25]])
    return images, Targets(gt, torch.tensor([[1, 2, 3], [2, 0, 0]]), valid, torch.zeros_like(valid), sizes)


def generators(purpose):
    return torch_generator(0, purpose)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(astuple(a), astuple(b), strict=True) if x is not None)


@pytest.mark.parametrize(
    ("scales", "read"),
    [
        (SCALES, [{256}, {256}, {64, 128, 256}]),  # anchors of 512; of 256; of 32, 64 and 128 px
        ((1,), [set(SIZES)]),
        ((0.5, 1, 2, 4, 8), [{256}] * 5),  # one size a scale
        ((2, 1), [{64, 128, 256}, {256, 512}]),
        ((0.9, 1.1), [{256, 512}, {32, 64, 128}]),
    ],
)
def test_an_anchor_is_read_at_the_scale_at_which_it_comes_nearest_to_224_px(scales, read):
    assert anchor_sizes_read(SIZES, scales, 224) == read


def test_the_nearest_scales_are_those_of_fast_rcnn():
    sides = torch.rand(200, generator=torch_generator(0, "sides")) * 600
    distance = torch.tensor([[abs((float(side) * scale) ** 2 - 224**2) for scale in SCALES] for side in sides])
    assert torch.equal(nearest_scales(sides**2, SCALES, 224)[:, 0], distance.argmin(1))
    both = nearest_scales(sides**2, SCALES, 224, 2)
    assert ((both[:, 0] - both[:, 1]).abs() == 1).all() and set(both.flatten().tolist()) == {0, 1, 2}
    assert nearest_scales(torch.zeros(1), SCALES, 224).tolist() == [[0]]  # padding, at the least cost


@pytest.mark.parametrize(
    ("row", "roi", "train"),
    [("c4", "nearest", "random"), ("c4", "adjacent_max", "one"), ("fpn", "nearest", "one"), ("fpn", "adjacent_max", "random")],
)
def test_one_scale_is_the_plain_detector_to_the_last_bit(network, row, roi, train):
    plain, pyramid = network(row=row, scales=None), network(row=row, scales=(1.0,), roi=roi, train=train)
    assert type(plain) is Detector and type(pyramid) is ImagePyramid
    images, targets = batch()
    losses = [model.losses(images, targets, generators) for model in (plain, pyramid)]
    assert losses[0] == losses[1]
    for to_train in (True, False):
        assert equal(*(model.eval().propose(images, targets.sizes, to_train) for model in (plain, pyramid)))
    detections = [model.detect(images, targets.sizes) for model in (plain, pyramid)]
    assert equal(*detections) and detections[0].valid.sum() > 10


def test_weights_of_the_plain_detector_fit(network):
    plain, pyramid = network(row="c4", scales=None), network()
    assert {n: p.shape for n, p in plain.state_dict().items()} == {n: p.shape for n, p in pyramid.state_dict().items()}
    assert all(torch.equal(p, pyramid.state_dict()[n]) for n, p in plain.state_dict().items())


def scaled_by_hand(images, sizes, scale):
    """Resize each image alone, without its padding, and pad again; the sizes here are even."""
    height, width = (round(side * scale) for side in images.shape[-2:])
    out = torch.zeros(len(images), 3, height, width)
    for image, target, (h, w) in zip(images.float(), out, sizes.tolist(), strict=True):
        size = (round(h * scale), round(w * scale))
        target[:, : size[0], : size[1]] = F.interpolate(
            image[None, :, :h, :w], scale_factor=scale, mode="bilinear", recompute_scale_factor=False
        )[0]
    return out, torch.tensor([[round(h * scale), round(w * scale)] for h, w in sizes.tolist()])


@torch.no_grad()
def test_proposals_are_the_best_of_plain_detectors_at_each_scale(network):
    """Each reads anchors of one range of sizes; NMS for each alone, then the best of all."""
    plain, pyramid = network("rpn", "c4", scales=None).eval(), network("rpn").eval()
    images, targets = batch()
    sizes = targets.sizes - targets.sizes % 2
    read = {0.5: (200, 300), 1: (200, 300), 2: (40, 300)}  # sides of anchors in scaled pixels, at a short side of 800
    unit = 64 / 800
    for n in range(2):
        candidates = []
        for scale in SCALES:
            scaled, scaled_sizes = scaled_by_hand(images, sizes, scale)
            (objectness,), (deltas,), (anchors,) = plain.rpn(plain.features(scaled, scaled_sizes))
            side = boxes.area(anchors).sqrt() / unit
            kept = (side > read[scale][0]) & (side < read[scale][1])
            score, idxs = objectness[n, kept].topk(min(50, int(kept.sum())))
            box = boxes.clip(boxes.decode(deltas[n, kept][idxs], anchors[kept][idxs])[None] / scale, sizes[n : n + 1])[0]
            keep = nms(box, score, 0.7)
            candidates.append((box[keep], score[keep]))
        box, score = (torch.cat(column) for column in zip(*candidates, strict=True))
        solid = boxes.area(box) > 0  # clipping can empty a box
        box, score = box[solid], score[solid]
        score, order = score.topk(40)
        ours = pyramid.propose(images, sizes)
        torch.testing.assert_close(ours.boxes[n][ours.valid[n]], box[order], atol=1e-3, rtol=1e-5)
        torch.testing.assert_close(ours.scores[n][ours.valid[n]], score.sigmoid(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("roi", ["nearest", "adjacent_max"])
@torch.no_grad()
def test_each_roi_is_classified_at_its_scale_or_from_the_maximum_of_two(network, roi):
    plain, pyramid = network(row="c4", scales=None).eval(), network(roi=roi).eval()
    images, targets = batch()
    sizes = targets.sizes - targets.sizes % 2
    proposals = pyramid.propose(images, sizes)
    hidden = []
    for scale in SCALES:
        features = plain.features(*scaled_by_hand(images, sizes, scale))
        hidden.append(plain.roi.box_head(plain.roi.pooler(features, proposals.boxes[:, :32] * scale)))
    chosen = nearest_scales(boxes.area(proposals.boxes[:, :32]).flatten(), SCALES, 224 * 64 / 800, pyramid.scales_per_roi)
    assert chosen.shape[1] == (1 if roi == "nearest" else 2) and len(chosen.unique()) == 3
    best = torch.stack(hidden).gather(0, chosen.T[..., None].expand(-1, -1, hidden[0].shape[1])).amax(0)
    scores, deltas = (x.unflatten(0, (2, 32)) for x in plain.roi.predictor(best))
    rois, valid = plain.roi.candidates(proposals)
    expected = plain.roi.detections(scores, deltas, rois, valid, sizes)
    ours = pyramid.detect(images, sizes, proposals)
    assert torch.equal(ours.labels, expected.labels) and ours.valid.sum() > 10
    torch.testing.assert_close(ours.boxes, expected.boxes, atol=1e-3, rtol=1e-5)
    other = network(roi="adjacent_max" if roi == "nearest" else "nearest").eval()
    assert not torch.equal(ours.scores, other.detect(images, sizes, proposals).scores)


def test_the_scale_is_drawn_for_each_batch_and_boxes_follow(network):
    plain, pyramid = network(row="c4", scales=None), network(train="random")
    images, targets = batch()
    sizes = targets.sizes - targets.sizes % 2
    targets = Targets(**vars(targets) | {"sizes": sizes})
    losses = []
    for scale in SCALES:
        scaled, scaled_sizes = scaled_by_hand(images, sizes, scale)
        of_scale = Targets(**vars(targets) | {"boxes": targets.boxes * scale, "sizes": scaled_sizes})
        losses.append(torch.stack(list(plain.losses(scaled, of_scale, generators).values())))
    drawn = []
    for step in range(12):
        values = pyramid.losses(
            images, targets, lambda purpose, step=step: torch_generator(*((step,) if purpose == "scale" else (0,)), purpose)
        )
        values = torch.stack(list(values.values()))
        drawn += [n for n, of_scale in enumerate(losses) if torch.allclose(values, of_scale, rtol=1e-4)]
    assert len(drawn) == 12 and set(drawn) == {0, 1, 2}
    one = network(train="one").losses(images, targets, generators)
    torch.testing.assert_close(torch.stack(list(one.values())), losses[1])


@pytest.mark.parametrize("task", TASKS)
def test_every_trained_parameter_gets_a_gradient_at_every_scale(network, task):
    for scale in SCALES:
        model = network(task, scales=(scale,))
        sum(model.losses(*batch(), generators).values()).backward()
        assert not [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]


@pytest.mark.parametrize("kind", ["none", "crowd"])
def test_images_without_objects_and_crowds_train(network, kind):
    images, targets = batch(65, 97)
    crowd = torch.ones_like(targets.valid) & (kind == "crowd")
    targets = Targets(**vars(targets) | {"valid": torch.zeros_like(targets.valid), "crowd": crowd})
    losses = network(scales=(0.5,)).losses(images, targets, generators)
    assert all(loss.isfinite() for loss in losses.values()) and float(losses["rpn_box"].detach()) == 0


@pytest.mark.parametrize("antialias", ["true", "false"])
def test_padding_and_what_lies_in_it_do_not_matter(network, antialias):
    """An image in a padded batch is resized as it is alone; odd sizes, and scales that leave fractions of a pixel."""
    model = network(scales=(0.7, 1.0, 1.3), numbers=(*NUMBERS[:2], f"recipe.antialias={antialias}")).eval()
    images, targets = batch(65, 97)
    other = images.clone()
    other[1, :, 51:], other[1, :, :, 72:] = 255, 255
    assert equal(*(model.detect(x, targets.sizes) for x in (images, other)))
    scaled, sizes, ratio = model.resize(images, targets.sizes, 0.7)
    assert scaled.shape == (2, 3, 46, 68) and torch.allclose(ratio, torch.tensor([68 / 97, 46 / 65] * 2))
    assert torch.allclose(sizes, targets.sizes * torch.tensor([46 / 65, 68 / 97]))
    constant, _, _ = model.resize(torch.full_like(images, 200), targets.sizes, 1.3)
    dark = torch.full_like(images, 200)
    dark[1, :, 51:], dark[1, :, :, 72:] = 0, 0
    assert torch.equal(model.resize(dark, targets.sizes, 1.3)[0], constant)


def test_images_are_resized_as_the_loader_does_it(network):
    images, _ = batch()
    full = torch.tensor([[64, 96]] * 2)
    for antialias in (True, False):
        model = network(numbers=(*NUMBERS[:2], f"recipe.antialias={antialias}".lower()))
        assert torch.equal(model.resize(images, full, 0.5)[0], resize(images, (32, 48), antialias))
    assert not torch.equal(resize(images, (32, 48), True).float(), resize(images, (32, 48), False))


def test_the_cost_is_the_sum_over_the_scales(config):
    size = (64, 96)
    cfg = config("ablation=image_pyramid", *JOINT)
    plain = config("ablation=c4", *JOINT)
    with torch.device("meta"):
        model, single = (build_detector(c, num_classes=CLASSES).eval() for c in (cfg, plain))
        cost, anchors = cost_by_part(model, size)
        singles = [cost_by_part(single, (round(64 * s), round(96 * s)))[0] for s in SCALES]
    for part in ("backbone", "neck", "rpn"):
        assert cost[part] == sum(of_scale[part] for of_scale in singles)
    assert cost["head"] == singles[1]["head"]
    assert anchors == 3 * (2 * 3 + 4 * 6 + 3 * 8 * 12)  # ratios x (cells of each scale x sizes there)
    facts, doubled = (row_facts(c, size=size) for c in (cfg, _changed(cfg, roi="adjacent_max")))
    assert facts.image_pyramid == "0.5, 1, 2" and facts.anchors == anchors
    assert 1.9 < doubled.gflops_head / facts.gflops_head < 2
    assert "image_pyramid" not in row_facts(plain, size=size).to_dict() and "image_pyramid" in facts.to_dict()


def _changed(cfg, **keys):
    return cfg.model_copy(update={"image_pyramid": cfg.image_pyramid.model_copy(update=keys)})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("task=segment_proposals",), "image_pyramid goes with task=rpn, .*, and not with task=segment"),
        (("task=mask_rcnn",), "and not with task=mask_rcnn: set image_pyramid=none, or another task"),
        (("image_pyramid.scales=[1,1]",), "image_pyramid.scales: a scale comes twice"),
        (("image_pyramid.scales=[]",), "image_pyramid.scales=.*: give a list of at least 1"),
        (("image_pyramid.rois=nearest",), "image_pyramid.rois: there is no such key. Did you mean image_pyramid.roi?"),
    ],
)
def test_what_does_not_go_together_is_refused(config, overrides, message):
    with pytest.raises(UserError, match=message):
        config("ablation=image_pyramid", *overrides)

"""SSD's default boxes, matching, hard negatives and loss, beside torchvision's."""

from types import SimpleNamespace

import pytest
import torch
from parts import dense_config
from torchvision.models.detection._utils import BoxCoder, SSDMatcher
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_iou

from fpn_ablate.model import anchors
from fpn_ablate.model.heads.ssd import SSDHead, cell_boxes, hard_negatives, match, scales
from fpn_ablate.model.matching import IGNORED, NEGATIVE, POSITIVE
from fpn_ablate.structures.instances import Targets
from fpn_ablate.structures.levels import Level

CLASSES = 5
COCO, VOC = [0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05], [0.1, 0.2, 0.37, 0.54, 0.71, 0.88, 1.05]
RATIOS = [[2], [2, 3], [2, 3], [2, 3], [2], [2]]
MAPS, STRIDES = (38, 19, 10, 5, 3, 1), (8, 16, 32, 64, 100, 300)  # of SSD300


def their_boxes(maps=MAPS, strides=STRIDES):
    generator = DefaultBoxGenerator(RATIOS[: len(maps)], scales=COCO[: len(maps) + 1], steps=list(strides))
    features = [torch.zeros(1, 1, cells, cells) for cells in maps]
    return generator(ImageList(torch.zeros(1, 3, 300, 300), [(300, 300)]), features)[0]


def head(levels, short_side=300, **keys):
    return SSDHead([Level(f"p{k}", 4) for k in levels], dense_config("ssd", **keys), CLASSES, short_side)


def maps_of(model, side):
    return {level.name: torch.zeros(1, 4, *[-(-side // level.stride)] * 2) for level in model.levels}


def objects(seed=0):
    """Three images: nine objects, two of them in one place; none; four."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(3, 9, 2, generator=generator, dtype=torch.float64) * 240
    side = (torch.rand(3, 9, 2, generator=generator, dtype=torch.float64) * 3.5).exp() * 4
    gt_boxes = torch.cat([corner, corner + side], -1)
    gt_boxes[0, 2] = gt_boxes[0, 1]
    valid = torch.ones(3, 9, dtype=torch.bool)
    valid[1], valid[2, 4:] = False, False
    labels = torch.randint(1, CLASSES + 1, (3, 9), generator=generator)
    return Targets(gt_boxes, labels, valid, torch.zeros_like(valid), torch.tensor([[300, 300]] * 3))


def their_matches(default_boxes, t):
    matcher = SSDMatcher(0.5)
    images = [box[valid] for box, valid in zip(t.boxes, t.valid, strict=True)]
    none = torch.full((len(default_boxes),), -1)
    return [matcher(box_iou(box, default_boxes)).clamp(min=-2) if len(box) else none for box in images]


def test_scales_are_those_of_coco_and_of_voc():
    assert scales(6, 0.15, 0.9, 0.07, True) == pytest.approx(COCO)
    assert scales(6, 0.2, 0.9, 0.1, True) == pytest.approx(VOC)
    # The formula of the paper, whose m levels include the first.
    assert scales(6, 0.2, 0.9, None, False) == pytest.approx([0.2 + 0.7 * k / 5 for k in range(7)])
    assert scales(1, 0.2, 0.9, 0.1, True) == [0.2, 0.9] and scales(2, 0.2, 0.9, 0.1, True) == [0.1, 0.2, 0.9]


def test_the_8732_default_boxes_of_ssd300_are_torchvisions():
    shares = scales(6, 0.15, 0.9, 0.07, True)
    ours = []
    for k, (cells, stride) in enumerate(zip(MAPS, STRIDES, strict=True)):
        sides = cell_boxes(shares[k], shares[k + 1], RATIOS[k], clip=True) * 300
        ours.append(anchors.grid(anchors.centered(sides, stride / 2), (stride, stride), cells, cells))
    assert len(torch.cat(ours)) == 8732
    torch.testing.assert_close(torch.cat(ours), their_boxes(), rtol=0, atol=1e-4)


def test_a_head_places_them_on_the_levels_of_its_neck():
    model = head(range(3, 9))
    ours = model.default_boxes(maps_of(model, 300))
    torch.testing.assert_close(torch.cat(ours[:4]), their_boxes(MAPS[:4], STRIDES[:4]), rtol=0, atol=1e-4)
    assert [len(level) for level in ours[4:]] == [9 * 4, 4 * 4]  # SSD's last layers have no stride: maps of 3 and 1 cells
    seven = head(range(3, 10), 512)
    assert sum(map(len, seven.default_boxes(maps_of(seven, 512)))) == 24564


@pytest.mark.usefixtures("at_once_and_image_by_image")
def test_matches_are_torchvisions():
    default_boxes, t = their_boxes().double(), objects()
    matched_idxs, labels = match(default_boxes, t.boxes, t.valid, t.crowd, 0.5)
    for n, expected in enumerate(their_matches(default_boxes, t)):
        assert torch.equal(labels[n] == POSITIVE, expected >= 0)
        assert torch.equal(matched_idxs[n][expected >= 0], expected[expected >= 0])
    assert (labels == POSITIVE).sum(1).tolist()[1] == 0 and not (labels == IGNORED).any()
    counts = matched_idxs[0][labels[0] == POSITIVE].bincount(minlength=9).tolist()
    assert counts[2] == 1 < counts[1]  # 2 lies where 1 does and takes its best box, and 1 keeps the others


def test_hard_negatives_and_losses_are_torchvisions_gradients_included():
    default_boxes, t = their_boxes().double(), objects()
    generator = torch.Generator().manual_seed(1)
    results = []
    raw = [torch.randn(3, len(default_boxes), n, generator=generator, dtype=torch.float64) for n in (CLASSES + 1, 4)]
    for ours in (True, False):
        logits, deltas = (x.clone().requires_grad_() for x in raw)
        if ours:
            matched = match(default_boxes, t.boxes, t.valid, t.crowd, 0.5)
            losses = head(range(3, 9)).losses_of(logits, deltas, default_boxes, *matched, t)
        else:
            theirs = SimpleNamespace(neg_to_pos_ratio=3, box_coder=BoxCoder(weights=(10.0, 10.0, 5.0, 5.0)))
            each = [{"boxes": b[v], "labels": k[v]} for b, k, v in zip(t.boxes, t.labels, t.valid, strict=True)]
            outputs = {"bbox_regression": deltas, "cls_logits": logits}
            expected = SSD.compute_loss(theirs, each, outputs, [default_boxes] * 3, their_matches(default_boxes, t))
            losses = {"class": expected["classification"], "box": expected["bbox_regression"]}
        (losses["class"] + 2 * losses["box"]).backward()
        results.append([losses["class"], losses["box"], logits.grad, deltas.grad])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    assert results[0][2].any(-1)[1].sum() == 0 and results[0][2].any(-1)[0].sum() % 4 == 0


def test_hard_negatives_are_the_hardest_three_for_each_positive_of_their_image():
    labels = torch.tensor([[1, 0, 0, -1, 0, 0], [0, 0, 0, 0, 0, 0], [1, 1, 0, 0, -1, 0]])
    loss = torch.tensor([[9.0, 1, 2, 9, 3, 4], [1, 2, 3, 4, 5, 6], [0, 0, 1, 1, 9, 1]])
    chosen = hard_negatives(loss, labels, 3)
    assert chosen.int().tolist() == [[0, 0, 1, 0, 1, 1], [0] * 6, [0, 0, 1, 1, 0, 1]]
    one = hard_negatives(loss, labels, 1)
    assert one[0].int().tolist() == [0, 0, 0, 0, 0, 1] and one.sum(1).tolist() == [1, 0, 2]  # of three equal ones, two
    assert (labels[chosen] == NEGATIVE).all()

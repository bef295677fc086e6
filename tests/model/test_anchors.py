"""Anchors: their number, their places, and that a head's output meets its own anchor."""

import math

import pytest
import torch
from parts import rpn_config
from torchvision.models.detection.anchor_utils import AnchorGenerator

from fpn_ablate.model import anchors, boxes
from fpn_ablate.model.build import build_detector
from fpn_ablate.model.heads.rpn import RPN, RPNHead
from fpn_ablate.model.summary import row_facts
from fpn_ablate.structures.levels import Level

PYRAMID = tuple(Level(f"p{k}", 8) for k in range(2, 7))
SIZES, RATIOS = (32, 64, 128, 256, 512), (0.5, 1, 2)
PAPER = {"c4": 47250, "c5": 12000, "fpn": 199974, "bottom_up": 199974, "no_lateral": 199974, "finest": 750000}


@pytest.mark.parametrize(("row", "expected"), PAPER.items())
def test_the_papers_number_of_anchors(config, row, expected):
    """The "# anchors" column of Table 1 (47k, 12k, 200k, 750k) is that of an image of 800 x 1000."""
    cfg = config(f"ablation={row}")
    assert row_facts(cfg).anchors == expected


@pytest.mark.parametrize("overrides", [(), ("neck.p6=none",), ("neck.p6=conv",), ("neck.output=p3",), ("ablation=c5",)])
@pytest.mark.parametrize("size", [(64, 64), (96, 160), (65, 97), (33, 1)])
def test_count_is_the_number_that_a_forward_pass_meets(config, overrides, size):
    cfg = config(*overrides)
    with torch.device("meta"):
        model = build_detector(cfg)
        objectness, deltas, made = model.rpn(model.neck(model.backbone(torch.empty(2, 3, *size))))
    numbers = [len(a) for a in made]
    assert [o.shape for o in objectness] == [(2, n) for n in numbers]
    assert [d.shape for d in deltas] == [(2, n, 4) for n in numbers]
    sizes = anchors.sizes_per_level(model.neck.levels, cfg.rpn.anchor_sizes)
    cells = [math.prod(math.ceil(side / level.stride) for side in size) for level in model.neck.levels]
    assert numbers == [n * len(row) * len(cfg.rpn.anchor_ratios) for n, row in zip(cells, sizes, strict=False)]


def test_a_small_table_by_hand():
    """Two rows, three columns, two sizes, two ratios: y slowest, then x, then size, then ratio."""
    cell = anchors.cell_anchors([4, 8], [1, 4])
    assert cell.tolist() == [[-2, -2, 2, 2], [-1, -4, 1, 4], [-4, -4, 4, 4], [-2, -8, 2, 8]]
    table = anchors.grid(cell, (16, 16), 2, 3)
    expected = [
        [x + a, y + b, x + c, y + d]
        for y in (0, 16)
        for x in (0, 16, 32)
        for a, b, c, d in [(-2, -2, 2, 2), (-1, -4, 1, 4), (-4, -4, 4, 4), (-2, -8, 2, 8)]
    ]
    assert table.tolist() == expected


def test_ratios_are_height_over_width_and_keep_the_area():
    cell = anchors.cell_anchors(SIZES, RATIOS)
    width, height = cell[:, 2] - cell[:, 0], cell[:, 3] - cell[:, 1]
    torch.testing.assert_close(height / width, torch.tensor(RATIOS * 5, dtype=torch.float32))
    torch.testing.assert_close(boxes.area(cell), torch.tensor(SIZES).repeat_interleave(3).float() ** 2)
    assert torch.equal(cell[:, :2], -cell[:, 2:])


def test_a_pyramid_has_one_size_a_level_and_a_single_map_has_them_all():
    assert anchors.sizes_per_level(PYRAMID, SIZES) == [[32], [64], [128], [256], [512]]
    assert anchors.sizes_per_level(PYRAMID[:4], SIZES) == [[32], [64], [128], [256]]
    assert anchors.sizes_per_level(PYRAMID[:1], SIZES) == [[32, 64, 128, 256, 512]]


@pytest.mark.parametrize("levels", [PYRAMID, PYRAMID[:1]])
def test_torchvisions_generator_gives_the_same_anchors(levels):
    """It rounds its base anchors, which does not matter where sides are even: ratios 1/4, 1, 4."""
    maps = [torch.zeros(1, 8, 64 // level.stride + 1, 128 // level.stride) for level in levels]
    sizes = anchors.sizes_per_level(levels, SIZES)
    ratios = (0.25, 1, 4)
    theirs = AnchorGenerator(tuple(map(tuple, sizes)), (ratios,) * len(levels))
    theirs.set_cell_anchors(torch.float32, torch.device("cpu"))
    expected = theirs.grid_anchors(
        [m.shape[-2:] for m in maps], [[torch.tensor(lv.stride), torch.tensor(lv.stride)] for lv in levels]
    )
    rpn = RPN(levels, rpn_config(anchor_ratios=ratios))
    ours = rpn.anchors({lv.name: m for lv, m in zip(levels, maps, strict=True)})
    for mine, other, level_sizes in zip(ours, expected, sizes, strict=True):
        # Within a cell its sizes vary fastest, ours its ratios.
        torch.testing.assert_close(mine, other.view(-1, len(ratios), len(level_sizes), 4).transpose(1, 2).reshape(-1, 4))


@pytest.mark.parametrize(("levels", "per_cell"), [(PYRAMID[:3], 3), (PYRAMID[1:2], 9)])
def test_each_planted_box_meets_its_own_score_and_deltas(levels, per_cell):
    """Level by level, cell by cell, anchor by anchor: plant a box at the place where (n, a, y, x) must be, and an output at
    (n, a, y, x); the flat index of the best IoU is the one that carries the output."""
    rpn = RPN(levels, rpn_config(anchor_sizes=(8, 16, 32), anchor_ratios=RATIOS))
    assert rpn.head.objectness.out_channels == per_cell
    shapes = {lv.name: (32 // lv.stride, 48 // lv.stride) for lv in levels}
    features = {name: torch.zeros(1, 8, *shape) for name, shape in shapes.items()}
    table = torch.cat(rpn.anchors(features))
    start = 0
    for level, sizes in zip(levels, rpn.level_sizes, strict=True):
        rows, columns = shapes[level.name]
        for y in range(rows):
            for x in range(columns):
                for a in range(per_cell):
                    size, ratio = sizes[a // len(RATIOS)], RATIOS[a % len(RATIOS)]
                    half = torch.tensor([size / ratio**0.5, size * ratio**0.5]) / 2
                    centre = torch.tensor([x, y]) * float(level.stride)
                    planted = torch.cat([centre - half, centre + half])
                    index = int(boxes.iou(planted[None], table)[0].argmax())
                    torch.testing.assert_close(table[index], planted)

                    scores = torch.zeros(1, per_cell, rows, columns)
                    scores[0, a, y, x] = 1
                    assert int(anchors.flatten_cells(scores, 1)[0, :, 0].argmax()) == index - start
                    deltas = torch.zeros(1, 4 * per_cell, rows, columns)
                    deltas[0, 4 * a : 4 * a + 4, y, x] = torch.tensor([1.0, 2, 3, 4])
                    flat = anchors.flatten_cells(deltas, 4)[0]
                    assert flat[index - start].tolist() == [1, 2, 3, 4]
                    assert flat.abs().sum() == 10
        start += rows * columns * per_cell


def test_one_head_serves_all_levels():
    torch.manual_seed(0)
    head, x = RPNHead(8, 3), torch.randn(1, 8, 4, 4)
    objectness, deltas = head({"p2": x, "p3": x})
    assert torch.equal(objectness[0], objectness[1])
    assert torch.equal(deltas[0], deltas[1])


def test_the_papers_sizes_scale_with_the_short_side(config):
    for side in (800, 200):
        rpn = RPN(PYRAMID, rpn_config(), short_side=side)
        assert rpn.level_sizes == [[size * side / 800] for size in SIZES]
    assert build_detector(config()).rpn.level_sizes == [[size * 64 / 800] for size in SIZES]


def test_anchors_follow_the_shape_of_the_maps(monkeypatch):
    """They are kept for the last few shapes; another shape must not meet the old ones."""
    monkeypatch.setattr("fpn_ablate.model.anchors.MAX_GRIDS", 2)
    rpn = RPN(PYRAMID[:1], rpn_config())
    small, large = ({"p2": torch.zeros(1, 8, *shape)} for shape in ((2, 3), (3, 2)))
    first = rpn.anchors(small)[0].clone()
    assert not torch.equal(rpn.anchors(large)[0], first)
    kept = rpn.anchors(small)[0]
    assert torch.equal(kept, first)
    rpn.anchors({"p2": torch.zeros(1, 8, 4, 4)})
    rpn.anchors(large)
    assert len(rpn.anchors.cached) == 2 and rpn.anchors(small)[0] is not kept

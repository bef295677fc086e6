"""Segment proposals: regions, their match with objects, losses and proposals, against slow references and by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from parts import segments_config

from fpn_ablate.model.build import build_detector
from fpn_ablate.model.detectors.segments import SegmentProposer
from fpn_ablate.model.heads.segments import SegmentHead, gather_windows, match
from fpn_ablate.model.init import initialise
from fpn_ablate.model.matching import IGNORED, MAX_PAIRS, NEGATIVE, POSITIVE, sample
from fpn_ablate.model.optimise import optimise
from fpn_ablate.model.summary import row_facts
from fpn_ablate.structures.instances import Targets
from fpn_ablate.structures.levels import Level
from fpn_ablate.structures.masks import ObjectMasks, paste
from fpn_ablate.utils import rle

LEVELS = tuple(Level(f"p{k}", 8) for k in (2, 3, 4))
SIDES = (64, 96)
CONFIG = {"scales": (10, 20, 40), "mask": 6, "hidden": 12, "samples": 80, "proposals": 30}


def head(levels=LEVELS, short_side=800, std=0.1, **keys):
    model = SegmentHead(levels, segments_config(**CONFIG | keys), short_side)
    for number, p in enumerate(model.parameters()):
        torch.nn.init.normal_(p, std=std, generator=generator(number))
    return model


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


def maps(model, images=3, seed=0, sides=SIDES):
    shapes = [(images, 8, *(math.ceil(s / level.stride) for s in sides)) for level in model.levels]
    return {
        level.name: torch.randn(shape, generator=generator(seed)) for level, shape in zip(model.levels, shapes, strict=True)
    }


def ellipses(boxes, size):
    """Masks that fill the boxes as ellipses."""
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    out = []
    for x1, y1, x2, y2 in np.asarray(boxes):
        a, b = (x - (x1 + x2) / 2) / max((x2 - x1) / 2, 1e-6), (y - (y1 + y2) / 2) / max((y2 - y1) / 2, 1e-6)
        out.append(a**2 + b**2 <= 1)
    return ObjectMasks(rle.encode(np.array(out, np.uint8)), size, size)


def targets():
    """Images of different sizes; the second without any object, the third with a crowd and two objects at one place."""
    gt = torch.zeros(3, 4, 4)
    gt[0, :2] = torch.tensor([[5.0, 5, 20, 18], [30, 10, 71, 50]])
    gt[2] = torch.tensor([[41.0, 30, 51, 44], [0, 0, 30, 30], [42, 30, 55, 41], [20, 35, 39, 45]])
    valid, crowd = torch.zeros(3, 4, dtype=torch.bool), torch.zeros(3, 4, dtype=torch.bool)
    valid[0, :2] = valid[2] = True
    valid[2, 1], crowd[2, 1] = False, True
    sizes = torch.tensor([[64, 96], [50, 96], [64, 70]])
    masks = [ellipses(boxes, tuple(size)) for boxes, size in zip(gt, sizes.tolist(), strict=True)]
    return Targets(gt, valid.long(), valid, crowd, sizes, masks)


def matched(model, t, features=None):
    regions = model.regions(features or maps(model, len(t.sizes)))
    return regions, *match(regions, t.boxes, t.valid, t.crowd, t.sizes, model.config.distance, model.config.winner)


# ---------------------------------------------------------------------------------------------------------------- regions


def test_regions_are_40_to_640_pixels_at_800_and_root_2_more_for_the_7x7():
    levels = [Level(f"p{k}", 8) for k in range(2, 7)]
    for mlp, ratios in ((5, [1]), (7, [2**0.5]), ("dual", [1, 2**0.5])):
        for short_side in (800, 400):
            model = SegmentHead(levels, segments_config(mlp=mlp), short_side)
            features = maps(model, 1, sides=(256, 320))
            regions = model.regions(features)
            side = regions.boxes[:, 2:] - regions.boxes[:, :2]
            torch.testing.assert_close(side[:, 0], side[:, 1])
            expected = [r * side * short_side / 800 for r in ratios for side in (40, 80, 160, 320, 640)]
            assert sorted({round(s, 1) for s in side[:, 0].tolist()}) == sorted(round(s, 1) for s in expected)
            torch.testing.assert_close(1.25 * regions.scales[regions.scale_idxs], side[:, 0])
            torch.testing.assert_close((regions.boxes[:, :2] + regions.boxes[:, 2:]) / 2, regions.centers)
            assert (
                len(regions.boxes) == model(features).shape[1] == len(ratios) * sum(x[0, 0].numel() for x in features.values())
            )
            assert set(zip(regions.strides.tolist(), (regions.scale_idxs % 5).tolist(), strict=True)) == {
                (4 * 2**k, k) for k in range(5)
            }


def test_a_window_spans_20_pixels_on_p2_and_is_0_outside_of_the_map():
    """On a map of the coordinates of its cells."""
    y, x = torch.meshgrid(torch.arange(16.0) * 4 + 1, torch.arange(24.0) * 4 + 1, indexing="ij")
    p2, p3 = torch.stack([y, x])[None], torch.zeros(1, 2, 8, 12)
    windows = gather_windows([p2, p3], torch.tensor([0, 0]), torch.tensor([5 * 24 + 7, 0]), 5)
    inner, corner = windows.unflatten(1, (5, 5))
    assert (inner[..., 0].amax() - inner[..., 0].amin() + 4, inner[0, 0].tolist()) == (20, [13, 21])
    assert (corner[:2] == 0).all() and (corner[:, :2] == 0).all() and corner[2, 2].tolist() == [1, 1]


@pytest.mark.parametrize("mlp", [5, 7, "dual"])
@pytest.mark.parametrize("levels", [LEVELS, LEVELS[1:2]])
def test_scores_and_masks_at_some_cells_are_those_of_dense_convolutions_gradients_included(mlp, levels):
    """Every region of every image, in any order and some of them twice."""
    model, results = head(levels, mlp=mlp), []
    for sampled in (False, True):
        features = {k: x.requires_grad_() for k, x in maps(model).items()}
        scores = model(features)
        idxs = torch.stack([torch.randperm(scores.shape[1], generator=generator(n)) for n in range(3)])
        idxs = torch.cat([idxs, idxs[:, :7]], 1)
        if sampled:
            score, mask = model.predict_at(features, idxs)
        else:
            dense = [
                mlp.mask(F.relu(mlp.conv(x))).unflatten(1, (-1, 36)).permute(0, 3, 4, 1, 2).reshape(3, -1, 6, 6)
                for mlp in model.mlps.values()
                for x in features.values()
            ]
            score = scores.gather(1, idxs)
            mask = torch.cat(dense, 1)[torch.arange(3)[:, None], idxs]
        model.zero_grad()
        share = torch.linspace(-1, 1, idxs.shape[1])
        ((score * share).sum() + (mask.cos() * share[:, None, None]).sum()).backward()
        results.append([score, mask, *(x.grad for x in features.values()), *(p.grad.clone() for p in model.parameters())])
    for dense, at in zip(*results, strict=True):
        torch.testing.assert_close(at, dense, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------- objects


def test_the_cells_of_an_object_by_hand():
    """Centre (10, 21), 10 px: on P2 the rows of 20 and 24 px and the columns of 8 and 12; no cell of another level."""
    model = head(mlp=5)
    t = Targets(
        torch.tensor([[[5.0, 17, 15, 25]]]), *[torch.ones(1, 1).bool()] * 2, torch.zeros(1, 1).bool(), torch.tensor([SIDES])
    )
    regions, idxs, labels = matched(model, t)
    cells = {(y // 4, x // 4) for x, y in regions.centers[labels[0] == POSITIVE].tolist()}
    assert cells == {(5, 2), (5, 3), (6, 2), (6, 3)}
    assert set(regions.strides[labels[0] == POSITIVE].tolist()) == {4} and not idxs[labels == POSITIVE].any()
    assert (labels == NEGATIVE).sum() == labels.numel() - 4
    # Exactly on a cell: also its neighbours at 4 px, "within" meaning at most.
    for distance, count in (("max", 9), ("euclidean", 5)):
        on_cell = Targets(t.boxes + torch.tensor([-2.0, -1, -2, -1]), *list(vars(t).values())[1:])
        assert (matched(head(mlp=5, distance=distance), on_cell)[2] == POSITIVE).sum() == count


@pytest.mark.parametrize(
    ("mlp", "extent", "scale"),
    [
        (5, 14.1, 10),
        (5, 14.2, 20),
        (5, 3, 10),
        (5, 500, 40),
        ("dual", 11.8, 10),
        ("dual", 12, 14.14),
        ("dual", 17, 20),
        (7, 19, 14.14),
    ],
)
def test_an_object_belongs_to_the_nearest_scale_in_log_space_of_its_longer_side(mlp, extent, scale):
    for width, height in ((extent, 2.0), (1.0, extent)):
        box = torch.tensor([[[48.0 - width / 2, 32 - height / 2, 48 + width / 2, 32 + height / 2]]])
        t = Targets(box, *[torch.ones(1, 1).bool()] * 2, torch.zeros(1, 1).bool(), torch.tensor([SIDES]))
        regions, _, labels = matched(head(mlp=mlp), t)
        assert {round(s, 2) for s in regions.scales[regions.scale_idxs[labels[0] == POSITIVE]].tolist()} == {scale}


@pytest.mark.parametrize("distance", ["max", "euclidean"])
@pytest.mark.parametrize("winner", ["nearest", "smallest"])
@pytest.mark.parametrize("levels", [LEVELS, LEVELS[1:2]])
def test_a_match_is_that_of_a_plain_loop(distance, winner, levels):
    model, t = head(levels, distance=distance, winner=winner), targets()
    regions, idxs, labels = matched(model, t)
    seen = set()
    for n in range(3):
        for q, (x, y) in enumerate(regions.centers.tolist()):
            fits = []
            for g in t.valid[n].nonzero()[:, 0].tolist():
                x1, y1, x2, y2 = t.boxes[n, g].tolist()
                apart = abs(x - (x1 + x2) / 2), abs(y - (y1 + y2) / 2)
                far = max(apart) if distance == "max" else math.hypot(*apart)
                ratios = [abs(math.log(max(x2 - x1, y2 - y1) / s)) for s in regions.scales.tolist()]
                if far <= regions.strides[q] and ratios.index(min(ratios)) == regions.scale_idxs[q]:
                    fits.append((far if winner == "nearest" else (x2 - x1) * (y2 - y1), g))
            in_crowd = any(
                bool(t.crowd[n, g]) and x1 <= x <= x2 and y1 <= y <= y2
                for g, (x1, y1, x2, y2) in enumerate(t.boxes[n].tolist())
            )
            ignored = in_crowd or x >= t.sizes[n, 1] or y >= t.sizes[n, 0]
            expected = POSITIVE if fits else IGNORED if ignored else NEGATIVE
            seen.add((expected, len(fits)))
            assert labels[n, q] == expected
            assert not fits or idxs[n, q] == min(fits)[1]
    assert {(POSITIVE, 1), (POSITIVE, 2), (NEGATIVE, 0), (IGNORED, 0)} <= seen


def test_a_batch_is_matched_as_its_images_one_by_one(monkeypatch):
    model, t = head(), targets()
    _, *together = matched(model, t)
    monkeypatch.setitem(MAX_PAIRS, "cpu", 1)
    _, *apart = matched(model, t)
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))


# ----------------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("mask_loss", ["logistic", "logistic_sum", "dice"])
@pytest.mark.parametrize("mask_average", ["positives", "samples"])
def test_losses_are_those_of_a_slow_loop_over_the_same_draws(mask_loss, mask_average):
    model, t = head(mask_loss=mask_loss, mask_average=mask_average), targets()
    features = maps(model)
    regions, objects, labels = matched(model, t)
    idxs, sampled = sample(labels, model.config.samples, model.config.positive_fraction, generator())
    scores = model(features).detach()
    score_loss, mask_loss_sum, positives = 0, 0, 0
    for n in range(3):
        for q in idxs[n][sampled[n]].tolist():
            p, positive = 1 / (1 + math.exp(-float(scores[n, q]))), int(labels[n, q]) == POSITIVE
            score_loss -= math.log(p if positive else 1 - p)
            if positive:
                positives += 1
                mask = model.predict_at(features, torch.full((3, 1), q))[1][n, 0].detach().double().sigmoid()
                # The region is around the cell, not around the object.
                share = t.masks[n].crop(objects[n, q : q + 1], regions.boxes[q : q + 1], 6)[0]
                y = (share >= 0.5).double()
                bins = -(y * mask.log() + (1 - y) * (1 - mask).log())
                one = {"logistic": bins.mean(), "logistic_sum": bins.sum()}
                one["dice"] = 1 - 2 * (mask * y).sum() / ((mask**2).sum() + y.sum())
                mask_loss_sum += float(one[mask_loss])
    assert positives > 5
    losses = model.losses(features, t, generator())
    assert list(losses) == ["segment_score", "segment_mask"]
    count = {"positives": positives, "samples": int(sampled.sum())}
    assert float(losses["segment_score"].detach()) == pytest.approx(score_loss / count["samples"], rel=1e-5)
    assert float(losses["segment_mask"].detach()) == pytest.approx(10 * mask_loss_sum / count[mask_average], rel=1e-5)


@pytest.mark.parametrize("room", [0, 2])
def test_without_any_object_masks_cost_nothing_and_everything_has_a_finite_gradient(room):
    model, nothing = head(), torch.zeros(3, room, dtype=torch.bool)
    sizes = targets().sizes
    masks = [ObjectMasks(rle.encode(np.zeros((room, 8, 8), np.uint8)), (8, 8), tuple(size)) for size in sizes.tolist()]
    losses = model.losses(
        maps(model), Targets(torch.zeros(3, room, 4), nothing.long(), nothing, nothing, sizes, masks), generator()
    )
    assert float(losses["segment_mask"].detach()) == 0 < losses["segment_score"]
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_positive_counts_as_positive_in_a_crowd_and_other_cells_there_are_not_sampled():
    t = targets()
    crowd = Targets(t.boxes, t.labels, t.valid, torch.ones_like(t.crowd), t.sizes, t.masks)
    crowd.boxes[:, -1] = torch.tensor([-1.0, -1, 999, 999])
    model = head()
    _, _, labels = matched(model, crowd)
    assert set(labels.unique().tolist()) == {POSITIVE, IGNORED}


# Keys of the task, a value of each that is not the default, and in what it shows.
SWITCHES = {
    **{"mlp": (5, "losses"), "mask": (8, "losses"), "hidden": (16, "losses"), "scales": ((10, 20, 60), "losses")},
    **{"ratio_7x7": (1.2, "losses"), "padding": (0.5, "losses"), "samples": (20, "losses")},
    **{"positive_fraction": (0.1, "losses"), "mask_weight": (1, "losses"), "distance": ("euclidean", "losses")},
    **{"winner": ("smallest", "losses"), "relu": (False, "losses"), "mask_loss": ("dice", "losses")},
    **{"mask_average": ("samples", "losses"), "proposals": (7, "proposals"), "init": ("xavier", "weights")},
}


@pytest.mark.parametrize("key", SWITCHES)
def test_every_switch_changes_what_it_says(key):
    value, where = SWITCHES[key]
    results = []
    for keys in ({}, {key: value}):
        model, t = head(**keys), targets()
        features = maps(model)
        if where == "losses":
            results.append([float(x.detach()) for x in model.losses(features, t, generator()).values()])
        elif where == "proposals":
            results.append(model.propose(features, t.sizes).boxes.shape)
        else:
            initialise(model, 0)
            results.append(float(model.mlps["5"].conv.weight.detach().std()))
    assert results[0] != results[1]


def test_every_key_of_the_task_is_tested_here_or_below():
    elsewhere = {"name", "schedule", "mask_threshold"}
    assert set(segments_config().model_dump()) == elsewhere | set(SWITCHES)


# -------------------------------------------------------------------------------------------------------------- proposals


def test_proposals_are_the_best_regions_with_their_masks_and_those_of_each_image_alone():
    model, t = head().eval(), targets()
    features = maps(model)
    together, scores, regions = model.propose(features, t.sizes), model(features), model.regions(features)
    assert together.masks.shape == (3, 30, 6, 6) and together.valid.all()
    for n in range(3):
        inside = [q for q, (x, y) in enumerate(regions.centers.tolist()) if y < t.sizes[n, 0] and x < t.sizes[n, 1]]
        best = sorted(inside, key=(-scores[n].detach()).tolist().__getitem__)[:30]
        torch.testing.assert_close(together.boxes[n], regions.boxes[best])
        torch.testing.assert_close(together.scores[n], scores[n, best].sigmoid())
        torch.testing.assert_close(together.masks[n], model.predict_at(features, torch.tensor([best] * 3))[1][n].sigmoid())
        alone = model.propose({k: x[n : n + 1] for k, x in features.items()}, t.sizes[n : n + 1])
        for a, b in zip(vars(alone).values(), vars(together).values(), strict=True):
            torch.testing.assert_close(a[0], b[n])


def test_an_image_with_fewer_cells_than_proposals_has_padding():
    model = head(proposals=10**6)
    proposals = model.propose(maps(model), torch.tensor([[64, 96], [4, 4], [64, 96]]))
    assert proposals.valid[1].sum() == 2 * 3  # the first cell of each of three levels, for two MLPs
    assert proposals.valid[0].all() and torch.isfinite(proposals.masks).all()


# ------------------------------------------------------------------------------------------------------------ the detector

SEGMENTS = ("mlp_5", "mlp_7", "mask_28", "mask_28_long")
ROWS = ("fpn", "bottom_up", "no_lateral", "finest", "c4", "c5", *(f"segments/{row}" for row in SEGMENTS))


@pytest.fixture
def network(config):
    def build(*overrides):
        model = build_detector(config("task=segment_proposals", "recipe=smoke", *overrides))
        initialise(model, 0)
        return model

    return build


def picture(seed=0, images=2):
    """Discs and bars on noise."""
    boxes = torch.tensor([[8.0, 10, 24, 26], [18, 20, 58, 50]])
    masks = ellipses(boxes, (64, 64))
    pixels = torch.randint(0, 60, (images, 3, 64, 64), generator=generator(seed)).float()
    pixels += 150 * torch.from_numpy(rle.decode(masks.counts, (64, 64)).max(0)).float()
    valid = torch.ones(images, 2, dtype=torch.bool)
    sizes = torch.tensor([[64, 64]] * images)
    return pixels, Targets(boxes.expand(images, -1, -1), valid.long(), valid, ~valid, sizes, [masks] * images)


def draw(purpose):
    return generator(len(purpose))


@pytest.mark.parametrize("row", ROWS)
def test_every_row_trains_all_its_parameters_and_proposes(network, row):
    model = network(f"ablation={row}")
    images, t = picture()
    assert isinstance(model, SegmentProposer)
    losses = model.losses(images, t, draw)
    assert list(losses) == ["segment_score", "segment_mask"] and losses["segment_mask"] > 0
    sum(losses.values()).backward()
    idle = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    # A level without objects of its scale has no positive; its weights are shared, so that nothing stays idle.
    assert not [n for n in idle if n.startswith("segments")]
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    proposals = model.eval().propose(images, t.sizes)
    side = 28 if "mask_28" in row else 14
    assert proposals.masks.shape[2:] == (side, side) and not proposals.masks.requires_grad


def test_rows_share_the_initial_weights_of_equal_names(network):
    five, seven, dual = (
        dict(network(f"ablation={row}").named_parameters()) for row in ("segments/mlp_5", "segments/mlp_7", "fpn")
    )
    for alone in (five, seven):
        assert all(torch.equal(p, dual[name]) for name, p in alone.items())
    assert {n for n in dual if n.startswith("segments")} == {n for n in (*five, *seven) if n.startswith("segments")}


@pytest.mark.parametrize("row", ["fpn", "c4"])
def test_fast_is_plain(network, row):
    plain, fast = network(f"ablation={row}"), optimise(network(f"ablation={row}"), torch.device("cpu"))
    images, t = picture()
    for a, b in zip(*(model.losses(images, t, draw).values() for model in (plain, fast)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    a, b = (model.eval().propose(images, t.sizes) for model in (plain, fast))
    torch.testing.assert_close(a.scores, b.scores, rtol=1e-4, atol=1e-5)


def test_twice_the_schedule_is_twice_the_steps(config):
    once, twice = (config("task=segment_proposals", f"task.schedule={n}") for n in (1, 2))
    assert (once.steps, twice.steps) == (once.recipe.steps, 2 * once.recipe.steps)


@pytest.mark.parametrize(
    ("row", "gmac", "regions"), [("segments/mlp_5", 111.8, 68_208), ("segments/mlp_7", 219.07, 68_208), ("fpn", 330.9, 136_416)]
)
def test_the_score_path_costs_what_the_paper_implies(config, row, gmac, regions):
    """At 800 x 1024: a 5x5 convolution of 128 to 512 channels, and one value more, at each cell of P2 to P6."""
    facts = row_facts(config("task=segment_proposals", "recipe=table6_2017", f"ablation={row}"), size=(800, 1024))
    assert facts.gflops_head / 2 == pytest.approx(gmac, abs=0.06)
    assert facts.anchors == regions and facts.gflops_rpn == 0
    assert facts.head == {"segments/mlp_5": "5x5", "segments/mlp_7": "7x7", "fpn": "5x5, 7x7"}[row]


def overlaps(proposals, t):
    """The best IoU of each object of the first image with the pasted proposals."""
    pasted = rle.decode(paste(proposals.masks[0], proposals.boxes[0], (64, 64)), (64, 64)).reshape(-1, 64 * 64).astype(float)
    truth = rle.decode(t.masks[0].counts, (64, 64)).reshape(-1, 64 * 64).astype(float)
    both = truth @ pasted.T
    return (both / (truth.sum(1)[:, None] + pasted.sum(1) - both)).max(1)


def test_a_picture_is_learned_by_heart(network):
    """Masks of the ten best proposals cover both objects."""
    scales = ("task.scales=[200,400,800,1600,3200]", "task.proposals=10", "task.hidden=32")
    model = network("backbone.freeze_at=0", "backbone.frozen_bn=false", "backbone.weights=none", *scales)
    images, t = picture(images=1)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(60):
        optimizer.zero_grad()
        sum(model.train().losses(images, t, lambda purpose: generator(step)).values()).backward()  # noqa: B023
        optimizer.step()
    ious = overlaps(model.eval().propose(images, t.sizes), t)
    assert (ious > 0.8).all(), ious

"""Every dense head: gradients, switches, images without objects, crowds, odd sizes, whole batches; on levels of one width or,
where a head has layers of each level's own, of several.
"""

import math
import sys

import pytest
import torch
from parts import dense_config

from fpn_ablate.model.init import initialise
from fpn_ablate.model.matching import POSITIVE
from fpn_ablate.model.parts import DENSE_HEADS
from fpn_ablate.structures.instances import Targets
from fpn_ablate.structures.levels import Level

LEVELS = tuple(Level(f"p{k}", 8) for k in (2, 3, 4))
WIDTHS = tuple(Level(f"c{k}", width) for k, width in ((3, 8), (4, 12), (5, 20), (6, 6)))
ONE = LEVELS[1:2]
SIDES = (50, 83)  # no multiples of anything; of padded images
CLASSES = 3
# Every switch of a head that has effect with its defaults, and one value that is not the default.
SWITCHES = {
    "fcos": {
        "range": 4.0,
        "center_sampling": None,
        "points": "center",
        "convolutions": 2,
        "norm": "none",
        "prior": 0.1,
        "centerness": "classification",
        "score": "product",
        "distances": "relu",
        "level_scale": False,
        "alpha": 0.5,
        "gamma": 1.0,
        "box_loss": "iou",
        "box_weights": "centerness",
    },
    "yolo": {
        "priors": ((20.0, 20.0), (60.0, 60.0)),
        "priors_per_level": 2,
        "norm": "gn",
        "prior": 0.1,
        "ignore": "predictions",
        "ignore_iou": 0.1,
        "weigh_small": False,
        "normaliser": "images",
    },
    "ssd": {
        "scales": (0.2, 0.9),
        "first_scale": None,
        "whole_percent": False,
        "ratios": (2.0,),
        "outer_ratios": (2.0, 3.0),
        "clip": False,
        "positive_iou": 0.7,
        "loss": "focal",
        "negatives": 1.0,
        "variances": (0.2, 0.1, 0.2, 0.2),
        "box_loss_beta": 0.1,
    },
}
FURTHER = [
    ("fcos", {"points": "torchvision"}),
    ("fcos", {"centerness": "none"}),
    ("fcos", {"norm": "none", "level_scale": False, "distances": "exp"}),
    ("yolo", {"norm": "none"}),
    ("ssd", {"loss": "focal"}),
]
EACH_HEAD = pytest.mark.parametrize("name", SWITCHES)


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


def head(name, levels=LEVELS, std=0.1, **keys):
    """A head for a short side of 64 px, with random weights; None: as `init` draws them.

    FCOS's ranges end at eight strides, as at 800 px; scaled to 64 px, an object would hold hardly a location.
    """
    keys = ({"range": 100.0} if name == "fcos" else {}) | keys
    model = DENSE_HEADS[name](levels, dense_config(name, **keys), CLASSES, 64)
    initialise(model, 0)
    if std is not None:
        for number, p in enumerate(model.parameters()):
            if p.dim() > 1:
                torch.nn.init.normal_(p, std=std, generator=generator(number))
            elif p.dim() == 0:
                torch.nn.init.constant_(p, 1.5)
    return model


def maps(model, images=3, sides=SIDES, seed=0):
    return {
        level.name: torch.randn(
            images, level.channels, *(math.ceil(s / level.stride) for s in sides), generator=generator(seed)
        )
        for level in model.levels
    }


def targets():
    """Images of different sizes; the second without any object, the third with a crowd and two objects at one place."""
    gt = torch.zeros(3, 4, 4)
    gt[0, :2] = torch.tensor([[5.0, 5, 20, 18], [30, 10, 71, 48]])
    gt[2] = torch.tensor([[41.0, 30, 51, 44], [0, 0, 30, 30], [41, 29, 52, 44], [20, 35, 39, 45]])
    valid, crowd = torch.zeros(3, 4, dtype=torch.bool), torch.zeros(3, 4, dtype=torch.bool)
    valid[0, :2] = valid[2] = True
    valid[2, 1], crowd[2, 1] = False, True
    labels = torch.tensor([[1, 3, 0, 0], [0, 0, 0, 0], [2, 1, 1, 3]])
    return Targets(gt, labels, valid, crowd, torch.tensor([[50, 83], [40, 83], [50, 70]]))


def part(t, images):
    columns = (t.boxes, t.labels, t.valid, t.crowd, t.sizes)
    return Targets(*(column[images] for column in columns))


def outcome(model, features, t):
    """Losses and predictions, as one vector."""
    predictions = [x.flatten() for level in model.predict(features) for x in level]
    return torch.cat([torch.stack(list(model.losses(features, t, generator()).values())), *predictions]).detach()


@EACH_HEAD
@pytest.mark.parametrize("levels", [LEVELS, ONE, (*LEVELS, Level("p5", 8), Level("p6", 8))], ids=["3", "1", "5"])
def test_every_parameter_has_a_gradient_from_objects_of_every_size(name, levels):
    model = head(name, levels)
    losses = model.losses(maps(model), targets(), generator())
    assert all(torch.isfinite(loss) and loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    shared = name == "fcos" or len(levels) == 1
    if shared:  # else a level may have no object, and its own factor no gradient
        assert all(p.grad.any() for parameter, p in model.named_parameters() if not parameter.startswith("scales."))


@pytest.mark.parametrize("name", ["yolo", "ssd"])
def test_levels_of_several_widths(name):
    model = head(name, WIDTHS)
    losses = model.losses(maps(model), targets(), generator())
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.detect(maps(model), targets().sizes).valid.any()


@pytest.mark.parametrize(("name", "keys"), FURTHER)
def test_other_values_train_and_detect(name, keys):
    model = head(name, **keys)
    sum(model.losses(maps(model), targets(), generator()).values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.detect(maps(model), targets().sizes).valid.any()


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in SWITCHES.items() for key in keys])
def test_no_switch_is_inert(name, key):
    levels = (*LEVELS, Level("p5", 8))
    std = None if key == "prior" else 0.1
    default, other = head(name, levels, std), head(name, levels, std, **{key: SWITCHES[name][key]})
    results = [outcome(model, maps(model), targets()) for model in (default, other)]
    assert results[0].shape != results[1].shape or not torch.allclose(*results)


@pytest.mark.parametrize("key", ["alpha", "gamma", "prior"])
def test_no_switch_of_ssds_focal_loss_is_inert(key):
    keys = {"alpha": 0.5, "gamma": 1.0, "prior": 0.1}
    models = [head("ssd", std=None, loss="focal", **more) for more in ({}, {key: keys[key]})]
    results = [outcome(model, maps(model), targets()) for model in models]
    assert not torch.allclose(*results)


@EACH_HEAD
def test_the_loss_of_a_batch_is_that_of_its_images(name, monkeypatch):
    """Sums over positives: weighted by their numbers, losses of images add up."""
    model = head(name).eval().double()  # batch norm as at test time: no image changes another
    features = {level: x.double() for level, x in maps(model).items()}
    t = targets()
    t = Targets(t.boxes.double(), t.labels, t.valid, t.crowd, t.sizes)
    seen, module = [], sys.modules[type(model).__module__]
    monkeypatch.setattr(module, "match", lambda *a, match=module.match: seen.append(match(*a)) or seen[-1])
    together, apart = model.losses(features, t, generator()), []
    counted = (seen[0][1] == POSITIVE).sum(1).tolist()
    assert counted[0] > 1 and counted[1] == 0 and counted[2] > 1
    for n in range(3):
        image = {level: x[n : n + 1] for level, x in features.items()}
        losses = model.losses(image, part(t, slice(n, n + 1)), generator())
        apart.append({key: value * max(counted[n], 1) for key, value in losses.items()})
    for key, value in together.items():
        torch.testing.assert_close(value, sum(losses[key] for losses in apart) / sum(counted))


@EACH_HEAD
@pytest.mark.parametrize("places", [0, 4])
def test_images_without_objects_teach_background_alone(name, places):
    model = head(name)
    sizes, nothing = targets().sizes, torch.zeros(3, places, dtype=torch.bool)
    t = Targets(torch.zeros(3, places, 4), torch.zeros(3, places, dtype=torch.int64), nothing, nothing, sizes)
    losses = model.losses(maps(model), t, generator())
    assert losses["box"] == 0 and torch.isfinite(sum(losses.values()))
    sum(losses.values()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    background = "objectness" if name == "yolo" else "class"
    assert (losses[background] == 0) == (name == "ssd")  # three negatives for each of no positives


@EACH_HEAD
def test_a_crowd_is_neither_object_nor_background(name):
    """What is in a crowd region of the whole image changes nothing; the same region as an object does."""
    t, keys = targets(), {"loss": "focal"} if name == "ssd" else {}
    model = head(name, **keys)
    whole = torch.tensor([0.0, 0, 83, 50]).repeat(1, 1, 1)
    yes, no = torch.ones(1, 1).bool(), torch.zeros(1, 1).bool()
    for crowd, learns in ((yes, False), (no, True)):
        lone = Targets(whole, torch.ones(1, 1).long(), ~crowd, crowd, t.sizes[:1])
        output = [x.detach().requires_grad_() for levels in model(maps(model, 1)) for x in levels]
        lists = [output[i : i + 3] for i in range(0, len(output), 3)]
        model.forward = lambda _, lists=lists: tuple(lists)
        sum(model.losses(maps(model, 1), lone, generator()).values()).backward()
        del model.forward
        box = torch.cat([b[0] for _, b in model.predict(maps(model, 1))]) if name != "ssd" else None
        moved = sum(int(x.grad.any(-1).sum()) for x in output if x.grad is not None)
        outside = _outside(model, name)
        assert (moved > outside) == learns, (moved, outside, box)


def _outside(model, name):
    """Boxes or locations of the padded image that lie in its region 83 x 50 by less than a half."""
    features = maps(model, 1)
    if name == "fcos":
        points = model.locations(features).points
        return int(((points <= 0) | (points >= torch.tensor([83.0, 50]))).any(-1).sum())
    box = model.priors(features).boxes if name == "yolo" else torch.cat(model.default_boxes(features))
    inside = (box[:, 2:].minimum(torch.tensor([83.0, 50])) - box[:, :2].clamp(min=0)).clamp(min=0).prod(-1)
    return int((inside * 2 < (box[:, 2:] - box[:, :2]).prod(-1)).sum())


@EACH_HEAD
def test_a_batch_is_detected_as_its_images_are(name):
    model, t = head(name).eval().double(), targets()  # in fp32 scores would change places
    features = {level: x.double() for level, x in maps(model).items()}
    for method in ("detect", "propose"):
        together = getattr(model, method)(features, t.sizes)
        for n, (height, width) in enumerate(t.sizes.tolist()):
            alone = getattr(model, method)({level: x[n : n + 1] for level, x in features.items()}, t.sizes[n : n + 1])
            valid = together.valid[n]
            torch.testing.assert_close(together.boxes[n][valid], alone.boxes[0][alone.valid[0]])
            torch.testing.assert_close(together.scores[n][valid], alone.scores[0][alone.valid[0]])
            box = together.boxes[n][valid]
            assert valid.sum() > 5 and (box >= 0).all() and (box <= torch.tensor([width, height] * 2)).all()
            assert (together.scores[n][valid].diff() <= 0).all()


@EACH_HEAD
def test_the_score_of_every_class_is_small_at_the_start(name):
    keys = {"loss": "focal"} if name == "ssd" else {}
    model = head(name, std=None, **keys).eval()
    scores = torch.cat([score.flatten() for score, _ in model.predict(maps(model))])
    if name == "fcos":  # the root of .01 times one half
        assert scores.mean().item() == pytest.approx((0.01 * 0.5) ** 0.5, rel=0.2)
    else:
        assert scores.mean().item() == pytest.approx({"yolo": 0.005, "ssd": 0.01}[name], rel=0.5)

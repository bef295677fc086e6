"""Linear probes: places, features there, the classifier and its accuracy."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fpn_ablate.data.shapes import World, compose, load
from fpn_ablate.data.shapes.world import BODIES
from fpn_ablate.engine.probe import Places, balanced_accuracy, choose_places, classify, features_at, probe, sample_map
from fpn_ablate.evaluation import bootstrap
from fpn_ablate.structures.batch import Sample
from fpn_ablate.utils.errors import UserError

USUAL = bootstrap.REPLICATES


@pytest.fixture(autouse=True)
def usual_replicates(monkeypatch):
    """Draw as many bootstrap samples as for users; shared_fixtures.py draws fewer."""
    monkeypatch.setattr(bootstrap, "REPLICATES", USUAL)


CPU = torch.device("cpu")
# Its level P2 is the picture itself, in the mean of 4 x 4 pixels.
LOOKS = SimpleNamespace(features=lambda images, sizes: {"p2": F.avg_pool2d(images.float(), 4)})


class Painted:
    """Grey noise with one object a picture, red or green, and a crowd region; the last picture has neither."""

    generated, name = False, "painted"
    categories = ({"id": 7, "name": "red"}, {"id": 9, "name": "green"})
    area_bounds = (100.0, 10_000.0)

    def __init__(self, seed: int, size: int = 48) -> None:
        rng = np.random.default_rng(seed)
        self.image_ids = list(range(100, 100 + size))
        self.sizes = np.array([[64, 64] if n % 2 else [96, 128] for n in range(size)])
        self.labels, self.corners = rng.integers(2, size=size), (rng.random((size, 2)) * [40, 30]).round()
        self.images = [rng.integers(90, 110, (*shape, 3), dtype=np.uint8) for shape in self.sizes]
        for image, label, (x, y) in zip(self.images[:-1], self.labels, self.corners.astype(int), strict=False):
            image[y : y + 20, x : x + 24, label] = 255

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, n: int) -> Sample:
        return Sample(self.images[n], np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, bool), self.image_ids[n])

    def coco(self) -> dict:
        annotations = []
        for key, label, corner in zip(self.image_ids[:-1], self.labels.tolist(), self.corners.tolist(), strict=False):
            entry = {"image_id": key, "category_id": (7, 9)[label], "bbox": [*corner, 24.0, 20.0], "area": 480.0, "iscrowd": 0}
            annotations += [entry, entry | {"bbox": [0.0, 50.0, 64.0, 14.0], "iscrowd": 1}]
        return {"annotations": annotations}


@pytest.fixture(scope="module")
def splits():
    return Painted(0), Painted(1)


@pytest.fixture(scope="module")
def places(splits):
    return [choose_places(split, name, 1000) for split, name in zip(splits, ("train", "val"), strict=True)]


def test_places_are_centres_of_objects_and_lie_outside_all_boxes(splits, places):
    for split, at in zip(splits, places, strict=True):
        is_object = at.labels > 0
        np.testing.assert_array_equal(at.points[is_object], split.corners[:-1] + np.array([12, 10]))
        np.testing.assert_array_equal(at.labels[is_object], split.labels[:-1] + 1)
        assert set(at.areas[is_object]) == {2} and set(at.areas[~is_object]) == {0}
        assert at.pictures[~is_object].tolist() == list(range(len(split)))  # the empty picture too
        corners, (x, y) = split.corners[at.pictures[~is_object]].T, at.points[~is_object].T
        in_object = (x >= corners[0]) & (x < corners[0] + 24) & (y >= corners[1]) & (y < corners[1] + 20)
        in_crowd = (y >= 50) & (y < 64) & (x < 64)
        full = np.arange(len(split)) < len(split) - 1
        assert not (in_object & full).any() and not (in_crowd & full).any()
        assert (at.points >= 0).all() and (at.points <= split.sizes[at.pictures][:, ::-1]).all()
    assert not np.array_equal(places[0].points[places[0].labels == 0], places[1].points[places[1].labels == 0])


def test_pictures_are_spread_over_the_split_and_draw_the_same_places_whatever_their_number(splits, places):
    few = choose_places(splits[0], "train", 3)
    assert sorted(set(few.pictures.tolist())) == [0, 24, 47]
    whole = places[0]
    for picture in (0, 24, 47):
        np.testing.assert_array_equal(few.points[few.pictures == picture], whole.points[whole.pictures == picture])


def test_background_of_the_generated_set_is_distractors_as_large_as_the_objects():
    split = load(World(height=128, width=128, seed=3), 6, 1)[0]
    at = choose_places(split, "train", 6)
    for picture in range(6):
        here = at.pictures == picture
        objects, others = (
            Counter(at.areas[here & (at.labels > 0 if is_object else at.labels == 0)]) for is_object in (True, False)
        )
        assert others and not others - objects
        distractors = {
            tuple(np.float32(thing.center)) for thing in compose(split.world, "train", picture)[2] if not thing.label
        }
        assert {tuple(point) for point in at.points[here & (at.labels == 0)]} <= distractors
        assert sum(objects.values()) == len(split[picture].boxes)
    assert Counter(at.areas[at.labels == 0])[1] == Counter(at.areas[at.labels > 0])[1]  # there are enough small ones


def test_a_thing_s_body_and_sides_do_not_tell_an_object_from_a_distractor():
    splits = load(World(seed=2, objects=(30, 40), distractors=(30, 40)), 40, 40)
    places = [choose_places(split, split.split, 40) for split in splits]
    geometry = []
    for split, at in zip(splits, places, strict=True):
        things = {
            (n, *np.float32(thing.center)): thing
            for n in range(len(split))
            for thing in compose(split.world, split.split, n)[2]
        }
        chosen = [things[place] for place in zip(at.pictures.tolist(), *at.points.T, strict=True)]
        rows = [[*thing.half, *np.log(thing.half), *(thing.body == body for body in BODIES)] for thing in chosen]
        geometry.append({"p2": torch.tensor(rows)})
        areas = np.array([np.prod(thing.half) for thing in chosen])
        assert areas[at.areas == 1].max() < areas[at.areas == 2].min() < areas[at.areas == 2].max() < areas[at.areas == 3].min()
    for of_size in probe(places[0], geometry[0], places[1], geometry[1])["p2"].values():
        assert of_size["object"].low < 0.5 < of_size["object"].high < of_size["object"].low + 0.2


def test_answers_that_are_rare_in_either_split_are_left_out():
    """Category 1 is rare in training, 4 in validation; the features tell all."""
    labels = [np.repeat([1, 2, 3, 4], counts) for counts in ((9, 20, 30, 12), (15, 10, 11, 9))]
    places = [Places(np.arange(len(n)), np.zeros((len(n), 2), np.float32), n, np.full(len(n), 1)) for n in labels]
    features = [{"p2": F.one_hot(torch.from_numpy(at.labels)).float()} for at in places]
    small = probe(places[0], features[0], places[1], features[1])["p2"]["small"]
    assert small["object"] is None  # no background at all
    assert (small["category"].value, small["category"].classes, small["category"].places) == (1, 2, 21)


def test_pictures_without_any_object_are_refused_in_words():
    for distractors in ((0, 0), (5, 5)):
        split = load(World(height=64, width=64, objects=(0, 0), distractors=distractors), 2, 1)[0]
        with pytest.raises(UserError, match="'train': no object in 2 pictures"):
            choose_places(split, "train", 2)


def test_a_map_is_interpolated_between_the_centres_of_its_cells():
    x, y = torch.meshgrid(torch.arange(6.0), torch.arange(4.0), indexing="xy")
    points = torch.tensor([[4.0, 4.0], [20.0, 12.0], [24.0, 16.0], [0.0, 31.0], [47.0, 2.0]])
    values = sample_map(torch.stack([x, y]), points, stride=8)
    expected = (points / 8 - 0.5).clamp(min=0).minimum(torch.tensor([5.0, 3.0]))
    torch.testing.assert_close(values, expected)


@pytest.fixture(scope="module")
def looks(config, splits, places):
    recipe = config().recipe
    return [features_at(LOOKS, split, at, recipe, CPU) for split, at in zip(splits, places, strict=True)]


def test_features_that_tell_the_class_give_100_percent_and_noise_gives_chance(places, looks):
    told = probe(places[0], looks[0], places[1], looks[1])
    assert told["p2"]["medium"]["object"].value == told["p2"]["medium"]["category"].value == 1
    assert told["p2"]["small"] == told["p2"]["large"] == {"object": None, "category": None}
    generator = torch.Generator().manual_seed(0)
    noise = [{"p2": torch.randn(len(at.labels), 8, generator=generator)} for at in places]
    for accuracy in probe(places[0], noise[0], places[1], noise[1])["p2"]["medium"].values():
        assert accuracy.low < 0.5 < accuracy.high and abs(accuracy.value - 0.5) < 0.15
    # Features of other places do not help: it is their place that tells.
    moved = [{"p2": features["p2"].roll(1, 0)} for features in looks]
    assert probe(places[0], moved[0], places[1], moved[1])["p2"]["medium"]["category"].value < 0.8


def test_a_probe_is_the_same_twice(places, looks):
    dim = [
        {"p2": features["p2"] + 60 * torch.randn(features["p2"].shape, generator=torch.manual_seed(1))} for features in looks
    ]
    first = probe(places[0], dim[0], places[1], dim[1])
    assert first == probe(places[0], dim[0], places[1], dim[1])
    assert 0.5 < first["p2"]["medium"]["object"].low < 1


def test_classes_weigh_the_same_whatever_their_numbers():
    """Of two equal bells, 0 and 2 apart from 0, the border is half-way, also with ten times as many places in one."""
    spread = torch.linspace(-1.5, 1.5, 100)[:, None]
    few, many = 2 + spread[::10], spread
    labels = np.repeat([5, 3], [len(few), len(many)])
    others = torch.linspace(-1, 3, 401)[:, None]
    predicted = classify(torch.cat([few, many]), labels, others)
    assert set(predicted) == {3, 5}
    assert float(others[predicted == 5].min()) == pytest.approx(1, abs=0.15)


def test_balanced_accuracy_is_the_mean_over_classes_with_an_interval_over_pictures():
    labels, predicted = np.array([1, 1, 1, 2, 2, 3]), np.array([1, 1, 2, 2, 2, 1])
    accuracy = balanced_accuracy(labels, predicted, np.arange(6))
    assert accuracy.value == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert 0 <= accuracy.low < accuracy.value < accuracy.high <= 1
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=400)
    right = rng.random(100) < 0.8  # all four places of a picture, or none
    predicted = np.where(np.repeat(right, 4), labels, 1 - labels)
    widths = []
    for pictures in (np.repeat(np.arange(100), 4), np.arange(400)):
        accuracy = balanced_accuracy(labels, predicted, pictures)
        widths.append(accuracy.high - accuracy.low)
    assert widths[0] == pytest.approx(2 * 1.96 * (0.8 * 0.2 / 100) ** 0.5, rel=0.2)
    assert widths[0] == pytest.approx(2 * widths[1], rel=0.2)

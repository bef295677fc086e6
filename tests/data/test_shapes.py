"""The generated world: the same bytes everywhere, boxes and masks that agree, nothing that gives objects away but meaning."""

import hashlib
import importlib
import inspect
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from pycocotools import mask as rle

from fpn_ablate.cli.main import main
from fpn_ablate.data import shapes
from fpn_ablate.data.coco import CocoDataset
from fpn_ablate.data.shapes import NUM_CLASSES, ShapesDataset, World, classification_picture, compose, render
from fpn_ablate.data.shapes.draw import draw
from fpn_ablate.utils.paths import PACKAGE

rendering = importlib.import_module("fpn_ablate.data.shapes.render")  # the package has a function of that name
WORLD = World(height=160, width=160, seed=3)
SIZES = [(160, 160), (97, 161), (200, 64), (33, 64)]


def digest(picture) -> str:
    sha = hashlib.sha256()
    for part in (picture.image, picture.boxes, picture.labels, picture.masks):
        sha.update(np.ascontiguousarray(part).tobytes())
    return sha.hexdigest()


@pytest.fixture(scope="module")
def pictures():
    return [render(WORLD, "train", index) for index in range(30)]


@pytest.mark.slow  # the digest of test_other_pixels_are_another_renderer was made by another process too
def test_another_process_renders_the_same_bytes(pictures):
    code = (
        "import hashlib, numpy as np\n"
        "from fpn_ablate.data.shapes import World, classification_picture, render\n"
        f"{inspect.getsource(digest)}\n"  # importing this file would take longer than all else
        f"print(digest(render({WORLD}, 'train', 5)))\n"
        f"print(hashlib.sha256(classification_picture({WORLD}, 7)[0].tobytes()).hexdigest())"
    )
    # The package as this process has it, wherever it was started and whatever else is installed.
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    here = hashlib.sha256(classification_picture(WORLD, 7)[0].tobytes()).hexdigest()
    assert done.stdout.split() == [digest(pictures[5]), here]


def test_other_pixels_are_another_renderer():
    """Identities of runs and cached results follow RENDERER: whoever changes a pixel increases it, and then this digest."""
    shown = [digest(render(World(height=96, width=128, seed=2), "val", index)) for index in range(3)]
    shown += [hashlib.sha256(classification_picture(WORLD, index)[0].tobytes()).hexdigest() for index in range(3)]
    assert (shapes.RENDERER, hashlib.sha256("".join(shown).encode()).hexdigest()[:16]) == (3, "d423317c18f590e2")


def test_the_global_generator_decides_nothing(pictures):
    np.random.seed(1)
    assert digest(render(WORLD, "train", 0)) == digest(pictures[0])


@pytest.mark.parametrize(
    "change", [{"seed": 4}, {"noise": 1.0}, {"patches": 1.0}, {"context": False}, {"width": 161}, {"mix": (0, 0, 1)}]
)
def test_what_a_world_says_matters(pictures, change):
    world = replace(WORLD, **change)
    assert [digest(render(world, "train", i)) for i in range(4)] != [digest(p) for p in pictures[:4]]
    assert ShapesDataset(world, "train", 4).digest != ShapesDataset(WORLD, "train", 4).digest


def test_splits_pictures_and_pre_training_are_all_different(pictures):
    val = [render(WORLD, "val", index) for index in range(10)]
    seen = [hashlib.sha256(p.image.tobytes()).hexdigest() for p in (*pictures, *val)]
    seen += [hashlib.sha256(classification_picture(WORLD, i)[0].tobytes()).hexdigest() for i in range(10)]
    assert len(set(seen)) == 50
    train, val = shapes.load(WORLD, 5, 5)
    assert train.digest != val.digest
    assert not np.array_equal(train[0].image, val[0].image)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_any_image_size(height, width):
    world = World(height=height, width=width, objects=(2, 4), distractors=(2, 4))
    for index in range(3):
        picture = render(world, "train", index)
        assert picture.image.shape == (height, width, 3)
        assert picture.image.dtype == np.uint8
        assert picture.masks.shape == (len(picture.boxes), height, width)
        assert (picture.boxes >= 0).all()
        assert (picture.boxes <= [width, height, width, height]).all()
        assert classification_picture(world, index)[0].shape == (height, width, 3)


def test_boxes_are_the_extents_of_masks_that_do_not_overlap(pictures):
    for picture in pictures:
        assert len(picture.boxes) == len(picture.labels) == len(picture.masks)
        assert picture.masks.sum(0).max(initial=0) <= 1
        for box, mask in zip(picture.boxes, picture.masks, strict=True):
            ys, xs = np.nonzero(mask)
            assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def test_every_thing_is_painted_in_its_own_hue_object_or_not():
    """Painted alone on grey, most coloured pixels show the hue that it is said to have."""
    for index in range(5):
        for thing in compose(WORLD, "train", index)[2]:
            canvas, owner = np.full((160, 160, 3), 120, np.float32), np.zeros((160, 160), np.int32)
            draw(canvas, owner, 1, thing, np.random.default_rng(0))
            colours = canvas[owner == 1]
            coloured = colours[np.ptp(colours, axis=1) > 40]
            assert len(coloured)
            assert Counter(coloured.argmax(1).tolist()).most_common(1)[0][0] == thing.hue


def test_an_object_that_others_hide_is_not_listed(monkeypatch):
    day, lanterns, things, rng = compose(WORLD, "train", 0)
    thing = next(t for t in things if t.label)
    front = replace(thing, label=0)
    monkeypatch.setattr(rendering, "compose", lambda *arguments: (day, lanterns, [thing, thing, front], rng))
    picture = render(WORLD, "train", 0)
    assert len(picture.boxes) == len(picture.labels) == len(picture.masks) == 0


@pytest.mark.parametrize("world", [WORLD, replace(WORLD, mix=(1, 1, 1))], ids=["default", "even"])
def test_small_medium_and_large_are_all_filled(world):
    dataset = ShapesDataset(world, "train", 50)
    counts = np.bincount(np.digitize([a["area"] for a in dataset.coco()["annotations"]], dataset.area_bounds))
    assert len(counts) == 3 and counts.min() >= (5 if world is WORLD else 0.08 * counts.sum()), counts


@pytest.mark.parametrize("side", [96, 192, 320])
def test_the_bounds_of_the_sizes_scale_with_the_picture(side):
    small, large = ShapesDataset(World(height=side, width=2 * side), "val", 1).area_bounds
    assert (small**0.5, large**0.5) == (pytest.approx(32 * side / 480), pytest.approx(96 * side / 480))


def statistics(world, pictures=400):
    """(day, object?) -> how often each (hue, mark) occurs, over all things, drawn or hidden."""
    table: dict[tuple[bool, bool], Counter] = {}
    for index in range(pictures):
        day, _, things, _ = compose(world, "train", index)
        for thing in things:
            table.setdefault((day, thing.label > 0), Counter())[thing.hue, thing.mark] += 1
    return table


@pytest.mark.slow
def test_objects_and_distractors_share_hues_and_marks():
    """Neither a hue nor a mark, nor a pair of them without the time of day, says that a thing is an object."""
    table = statistics(WORLD)
    for part, number_of_values in ((0, NUM_CLASSES), (1, len(shapes.MARKS))):
        shares = {}
        for is_object in (True, False):
            counts = Counter()
            for (_, kind), pairs in table.items():
                if kind == is_object:
                    for pair, number in pairs.items():
                        counts[pair[part]] += number
            shares[is_object] = np.array([counts[k] for k in range(number_of_values)]) / sum(counts.values())
        assert np.abs(shares[True] - 1 / number_of_values).max() < 0.05
        assert np.abs(shares[False] - 1 / number_of_values).max() < 0.05
    of_objects, of_distractors = (
        {pair for (_, kind), pairs in table.items() if kind == is_object for pair in pairs} for is_object in (True, False)
    )
    assert of_objects == of_distractors


def test_the_pair_of_hue_and_mark_decides_given_the_time_of_day_if_there_is_one():
    for world, days in ((WORLD, {True, False}), (replace(WORLD, context=False), {True})):
        table = statistics(world, 100)
        assert set(table) == {(day, kind) for day in days for kind in (True, False)}
        assert not any(set(table[day, True]) & set(table[day, False]) for day in days)


def test_with_one_mix_objects_and_distractors_have_the_same_sizes_and_bodies():
    world = replace(WORLD, distractor_mix=WORLD.mix, objects=(6, 10), distractors=(10, 14))
    sides, bodies = {True: [], False: []}, {True: Counter(), False: Counter()}
    for index in range(400):
        for thing in compose(world, "train", index)[2]:
            sides[thing.label > 0].append(np.log(thing.half[0] * thing.half[1]) / 2)
            bodies[thing.label > 0][thing.body] += 1
    a, b = (np.array(sides[kind]) for kind in (True, False))
    error = (a.var() / len(a) + b.var() / len(b)) ** 0.5
    assert abs(a.mean() - b.mean()) < 5 * error
    for body in bodies[True] | bodies[False]:
        x, y = (bodies[kind][body] / bodies[kind].total() for kind in (True, False))
        assert abs(x - y) < 0.06


def test_with_one_scale_what_lies_in_front_does_not_tell_objects():
    world = replace(WORLD, single_scale=0.1, objects=(6, 6), distractors=(6, 6))
    ranks = {True: [], False: []}
    for index in range(100):
        for rank, thing in enumerate(compose(world, "train", index)[2]):
            ranks[thing.label > 0].append(rank)
    assert abs(np.mean(ranks[True]) - np.mean(ranks[False])) < 1


def test_a_label_is_the_hue_and_all_classes_occur(pictures):
    labels = Counter(label for p in pictures for label in p.labels.tolist())
    assert set(labels) == set(range(1, NUM_CLASSES + 1))
    for index in range(20):
        for thing in compose(WORLD, "train", index)[2]:
            assert thing.label in (0, thing.hue + 1)


def test_a_single_scale_has_one_size():
    world = replace(WORLD, single_scale=0.2)
    sides = [2 * (t.half[0] * t.half[1]) ** 0.5 for i in range(20) for t in compose(world, "train", i)[2]]
    assert np.allclose(sides, 0.2 * 160)


def test_numbers_of_objects_stay_within_their_limits():
    """A thing that finds no place is left out, so there may be fewer; small ones always find one."""
    world = replace(WORLD, objects=(2, 3), distractors=(0, 0), extent=(0.06, 0.07), mix=(1, 0, 0), single_scale=0.06)
    numbers = [len(compose(world, "train", index)[2]) for index in range(30)]
    assert set(numbers) == {2, 3}
    nothing = render(replace(WORLD, objects=(0, 0)), "train", 0)
    assert nothing.boxes.shape == (0, 4)
    assert nothing.masks.shape == (0, 160, 160)


def test_pre_training_shows_every_kind_equally_often():
    small = World(height=32, width=32, seed=1)
    kinds = Counter(classification_picture(small, index)[1] for index in range(600))
    expected = 600 / shapes.NUM_KINDS
    assert set(kinds) == set(range(shapes.NUM_KINDS))
    assert all(abs(number - expected) < 5 * expected**0.5 for number in kinds.values())


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    main(["shapes", "--export", str(folder), "--train", "3", "--val", "2", "--size", "128", "--seed", "9"])
    return folder


@pytest.mark.parametrize(("split", "size"), [("train", 3), ("val", 2)])
def test_the_export_read_back_as_a_coco_set_is_the_original(exported, split, size):
    world = World(height=128, width=128, seed=9)
    original = ShapesDataset(world, split, size)
    annotations = exported / "annotations" / f"instances_{split}.json"
    copy = CocoDataset(annotations, exported / "images", "copy", masks=True)
    assert len(copy) == size and copy.generated
    assert list(copy.categories) == list(original.categories)
    for index in range(size):
        a, b = original[index], copy[index]
        assert a.image_id == b.image_id
        for name in ("image", "boxes", "labels", "crowd"):
            assert np.array_equal(getattr(a, name), getattr(b, name)), name
        assert a.masks == b.masks
    assert copy.coco()["annotations"] == original.coco()["annotations"]

    written = json.loads(annotations.read_text())
    masks = {i: iter(render(world, split, i - 1).masks) for i in original.image_ids}
    for annotation in written["annotations"]:
        decoded = rle.decode(annotation["segmentation"]).astype(bool)
        assert np.array_equal(decoded, next(masks[annotation["image_id"]]))
        assert rle.area(annotation["segmentation"]) == annotation["area"]
        assert rle.toBbox(annotation["segmentation"]).tolist() == annotation["bbox"]


def test_pictures_rendered_ahead_by_processes_are_the_same():
    plain, ahead = (ShapesDataset(replace(WORLD, height=64, width=64), "train", 3) for _ in range(2))
    ahead.render_all(2)
    assert ahead.coco() == plain.coco()
    assert ahead.sizes.tolist() == [list(ahead[i].image.shape[:2]) for i in range(3)]
    assert all(np.array_equal(plain[i].image, ahead[i].image) for i in range(3))

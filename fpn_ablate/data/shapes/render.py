"""Render a picture of a world: pixels, boxes and masks; or a picture of a single thing, for pre-training."""

import math
from dataclasses import dataclass

import numpy as np

from fpn_ablate.data.shapes.draw import background, draw, draw_lanterns, finish
from fpn_ablate.data.shapes.world import BODIES, NUM_CLASSES, RENDERER, Thing, World, compose, lantern_spots, pick_parts
from fpn_ablate.utils.seeding import numpy_generator

NUM_KINDS = 2 * 2 * NUM_CLASSES


@dataclass(frozen=True)
class Picture:
    """A rendered picture with its G objects; distractors are not listed."""

    image: np.ndarray  # (H, W, 3) uint8
    boxes: np.ndarray  # (G, 4) float32, XYXY
    labels: np.ndarray  # (G,) int64, 1..K
    masks: np.ndarray  # (G, H, W) bool: visible pixels


def render(world: World, split: str, index: int) -> Picture:
    """Render picture `index` of a split: a pure function of its arguments."""
    day, lanterns, things, rng = compose(world, split, index)
    canvas = background(world, rng)
    draw_lanterns(canvas, world, lanterns, day)
    owner = np.zeros((world.height, world.width), np.int32)
    for number, thing in enumerate(things, start=1):
        draw(canvas, owner, number, thing, rng)
    numbers = [n for n, thing in enumerate(things, start=1) if thing.label and (owner == n).any()]
    masks = np.stack([owner == n for n in numbers]) if numbers else np.zeros((0, *owner.shape), bool)
    boxes = np.array([mask_box(m) for m in masks], np.float32).reshape(-1, 4)
    labels = np.array([things[n - 1].label for n in numbers], np.int64)
    return Picture(finish(canvas, world.noise, rng), boxes, labels, masks)


def mask_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return the XYXY box of the pixels that are set; the far edges are one past the last pixel."""
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1


def classification_picture(world: World, index: int) -> tuple[np.ndarray, int]:
    """Render one thing of any size on a background of the same world.

    It pre-trains a backbone, as ImageNet does for photographs. Half of the kinds are objects, half are distractors.

    Returns:
        The picture (H, W, 3) uint8, and its kind in 0..NUM_KINDS - 1: hue, which of its two marks, time of day.
    """
    rng = numpy_generator("classify", RENDERER, world.seed, index)
    day, is_object = bool(rng.random() < 0.5) or not world.context, bool(rng.random() < 0.5)
    hue, mark, _ = pick_parts(is_object, day, rng)
    kind = hue + NUM_CLASSES * (is_object + 2 * day)
    # Uniform on the log scale, from the shortest side of a thing up to what fits into the picture.
    low, high = (share * world.short_side for share in world.extent)
    side = math.exp(rng.uniform(math.log(low), math.log(min(high, 0.9 * min(world.height, world.width)))))
    stretch = math.exp(rng.uniform(-0.35, 0.35))
    half = side / 2 * stretch, side / 2 / stretch
    # A stretched thing may exceed the picture; its centre stays at least a quarter inside.
    center = tuple(
        rng.uniform(min(h, 0.25 * s), max(s - h, 0.75 * s)) for h, s in zip(half, (world.width, world.height), strict=True)
    )
    thing = Thing(BODIES[int(rng.integers(len(BODIES)))], hue, mark, 0, center, half, rng.uniform(-0.2, 0.2))
    canvas = background(world, rng)
    lanterns = lantern_spots(world, rng)
    draw_lanterns(canvas, world, lanterns, day)
    draw(canvas, np.zeros(canvas.shape[:2], np.int32), 1, thing, rng)
    return finish(canvas, world.noise, rng), kind

"""What a picture holds: where things and lanterns stand, and which things are objects."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fpn_ablate.seeding import numpy_generator

HUES = ("red", "green", "blue")
MARKS = ("dot", "bar", "post")
BODIES = ("disc", "square", "diamond", "triangle")
COCO_SHORT_SIDE = 480
NUM_CLASSES = len(HUES)
LANTERN_RADIUS = 0.02  # share of the short side

# Enlarged whenever the renderer draws something else, so that no cached result outlives its picture.
RENDERER = 1


@dataclass(frozen=True)
class World:
    """Everything that decides a picture, but its index.

    `mix`: shares of small, medium and large among the things. `extent`: shortest and longest side of a thing as a share
    of the image's short side. `single_scale`: every thing has that one size (a control on which a pyramid cannot help).
    """

    height: int = 192
    width: int = 192
    seed: int = 0
    objects: tuple[int, int] = (4, 8)
    distractors: tuple[int, int] = (8, 16)
    mix: tuple[float, float, float] = (0.45, 0.35, 0.20)
    extent: tuple[float, float] = (0.05, 0.55)
    single_scale: float | None = None
    lanterns: float = 0.375  # distance between neighbouring lanterns as a share of the short side
    patches: float = 22.0  # amplitude of the patches of brightness, grey levels
    noise: float = 8.0  # standard deviation of the pixel noise, grey levels
    context: bool = True  # False: it is always day
    reference: int | None = None  # pixels that shares are of; None: the short side. Others: a detail of a larger picture

    @property
    def short_side(self) -> int:
        return self.reference or min(self.height, self.width)

    @property
    def bounds(self) -> tuple[float, float]:
        """Square root of the area at which small ends and large begins, in pixels."""
        scale = self.short_side / COCO_SHORT_SIDE
        return 32 * scale, 96 * scale


@dataclass(frozen=True)
class Thing:
    """One drawn thing. `label` is its hue, 1..K, or 0 for a distractor."""

    body: str
    hue: int
    mark: int
    label: int
    center: tuple[float, float]  # x, y in pixels
    half: tuple[float, float]  # half width and half height in pixels
    angle: float  # radians


def lantern_spots(world: World, rng: np.random.Generator) -> np.ndarray:
    """(M, 2) centres x, y: one somewhere in each cell of a grid, so that no place is far from all of them."""
    step = world.lanterns * world.short_side
    columns, rows = (max(1, round(side / step)) for side in (world.width, world.height))
    at = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), -1).reshape(-1, 2) + rng.uniform(
        0.15, 0.85, (columns * rows, 2)
    )
    return at * [world.width / columns, world.height / rows]


def _pick_side(world: World, rng: np.random.Generator) -> float:
    """Geometric mean of a thing's width and height in pixels: a bucket by `mix`, then even on the log scale inside it."""
    if world.single_scale is not None:
        return world.single_scale * world.short_side
    low, high = (e * world.short_side for e in world.extent)
    # Bodies fill about 0.7 of their box, so a box whose side is 1.2 times the bound has about the bound's area.
    edges = (low, 1.2 * world.bounds[0], 1.2 * world.bounds[1], high)
    bucket = int(rng.choice(3, p=np.asarray(world.mix) / sum(world.mix)))
    return math.exp(rng.uniform(math.log(edges[bucket]), math.log(edges[bucket + 1])))


def pick_parts(is_object: bool, day: bool, rng: np.random.Generator) -> tuple[int, int, int]:
    """(hue, mark, label). Objects and distractors show every hue and every mark equally often."""
    hue = int(rng.integers(NUM_CLASSES))
    mark = (hue + (day != is_object)) % NUM_CLASSES
    return hue, mark, hue + 1 if is_object else 0


def _place(world: World, side: float, taken: np.ndarray, rng: np.random.Generator) -> tuple[Any, Any] | None:
    """A centre and half sides that hide at most a quarter of anything placed before, or None after 20 tries."""
    for _ in range(20):
        stretch = math.exp(rng.uniform(-0.35, 0.35))
        half = side / 2 * stretch, side / 2 / stretch
        center = (
            rng.uniform(0.6 * half[0], world.width - 0.6 * half[0]),
            rng.uniform(0.6 * half[1], world.height - 0.6 * half[1]),
        )
        box = np.array([center[0] - half[0], center[1] - half[1], center[0] + half[0], center[1] + half[1]])
        if len(taken) == 0:
            return center, half
        shared = np.clip(np.minimum(taken[:, 2:], box[2:]) - np.maximum(taken[:, :2], box[:2]), 0, None).prod(1)
        smaller = np.minimum((taken[:, 2:] - taken[:, :2]).prod(1), 4 * half[0] * half[1])
        if (shared <= 0.25 * smaller).all():
            return center, half
    return None


def compose(world: World, split: str, index: int) -> tuple[bool, np.ndarray, list[Thing], np.random.Generator]:
    """Is it day, where the lanterns are, the things of picture `index`, back to front, and the generator that paints them."""
    rng = numpy_generator("shapes", RENDERER, world.seed, split, index)
    day = bool(rng.random() < 0.5) or not world.context
    counts = (
        rng.integers(world.objects[0], world.objects[1] + 1),
        rng.integers(world.distractors[0], world.distractors[1] + 1),
    )
    wanted = sorted(
        ((_pick_side(world, rng), kind < counts[0]) for kind in range(sum(counts))), key=lambda w: w[0], reverse=True
    )
    things: list[Thing] = []
    lanterns, reach = lantern_spots(world, rng), LANTERN_RADIUS * world.short_side
    taken = np.hstack([lanterns - reach, lanterns + reach])
    for side, is_object in wanted:
        spot = _place(world, side, taken, rng)
        if spot is None:
            continue
        center, half = spot
        hue, mark, label = pick_parts(is_object, day, rng)
        body, angle = BODIES[int(rng.integers(len(BODIES)))], rng.uniform(-0.2, 0.2)
        things.append(Thing(body, hue, mark, label, center, half, angle))
        box = [center[0] - half[0], center[1] - half[1], center[0] + half[0], center[1] + half[1]]
        taken = np.vstack([taken, box])
    return day, lanterns, things, rng

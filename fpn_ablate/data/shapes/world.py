"""Compose pictures: place things and lanterns, and decide which things are objects."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fpn_ablate.utils.seeding import numpy_generator

HUES = ("red", "green", "blue")
MARKS = ("dot", "bar", "post")
BODIES = ("disc", "square", "diamond", "triangle")
COCO_SHORT_SIDE = 480
NUM_CLASSES = len(HUES)
LANTERN_RADIUS = 0.02  # share of the short side
# Increase it with every change of the rendered pixels, so that no cached result of the old pictures is used.
RENDERER = 3


@dataclass(frozen=True)
class World:
    """The parameters of all pictures.

    `mix`: shares of small, medium and large among the objects; `distractor_mix`: the same of distractors, of which many large
    ones would leave no room. `extent`: shortest and longest side of a thing as a share of the image's short side.
    `single_scale`: one size for all things, as such a share (a control on which a pyramid cannot help).
    """

    height: int = 256
    width: int = 256
    seed: int = 0
    objects: tuple[int, int] = (6, 10)
    distractors: tuple[int, int] = (55, 70)
    mix: tuple[float, float, float] = (0.50, 0.30, 0.20)
    distractor_mix: tuple[float, float, float] = (0.84, 0.12, 0.04)
    extent: tuple[float, float] = (0.05, 0.55)
    single_scale: float | None = None
    lanterns: float = 0.375  # distance between neighbouring lanterns as a share of the short side
    patches: float = 22.0  # amplitude of the patches of brightness, grey levels
    noise: float = 8.0  # standard deviation of the pixel noise, grey levels
    context: bool = True  # False: it is always day
    reference: int | None = None  # pixels to which shares refer; None: the short side. Others: a detail of a larger picture

    @property
    def short_side(self) -> int:
        """Return the pixels to which shares refer."""
        return self.reference or min(self.height, self.width)

    @property
    def bounds(self) -> tuple[float, float]:
        """Return the square roots of the areas at which small ends and large begins, in pixels."""
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
    """Return the centres (M, 2) x, y of lanterns: one in each cell of a grid, so that there is one near every place."""
    step = world.lanterns * world.short_side
    columns, rows = (max(1, round(side / step)) for side in (world.width, world.height))
    at = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), -1).reshape(-1, 2) + rng.uniform(
        0.15, 0.85, (columns * rows, 2)
    )
    return at * [world.width / columns, world.height / rows]


def _pick_side(world: World, mix: tuple[float, float, float], rng: np.random.Generator) -> float:
    """Draw the geometric mean of a thing's sides, in pixels: small, medium or large by `mix`, then uniform on the log scale."""
    if world.single_scale is not None:
        return world.single_scale * world.short_side
    low, high = (e * world.short_side for e in world.extent)
    # Bodies fill about 0.7 of their box, so a box whose side is 1.2 times the bound has about the bound's area.
    edges = (low, 1.2 * world.bounds[0], 1.2 * world.bounds[1], high)
    bucket = int(rng.choice(3, p=np.asarray(mix) / sum(mix)))
    return math.exp(rng.uniform(math.log(edges[bucket]), math.log(edges[bucket + 1])))


def pick_parts(is_object: bool, day: bool, rng: np.random.Generator) -> tuple[int, int, int]:
    """Draw (hue, mark, label). Objects and distractors show every hue and every mark equally often."""
    hue = int(rng.integers(NUM_CLASSES))
    mark = (hue + (day != is_object)) % NUM_CLASSES
    return hue, mark, hue + 1 if is_object else 0


def _place(world: World, side: float, occupied: np.ndarray, rng: np.random.Generator) -> tuple[Any, Any] | None:
    """Draw a centre and half sides that hide at most a quarter of each of the `occupied` boxes; None after 20 failures."""
    stretch = rng.uniform(0.7, 1.4, (20, 1))
    half = side / 2 * np.hstack([stretch, 1 / stretch])
    center = 0.6 * half + rng.random((20, 2)) * ([world.width, world.height] - 1.2 * half)
    low, high = center - half, center + half
    shared = np.minimum(occupied[:, 2:], high[:, None]) - np.maximum(occupied[:, :2], low[:, None])
    shared = np.maximum(shared, 0).prod(-1)
    smaller = np.minimum((occupied[:, 2:] - occupied[:, :2]).prod(1), side**2)
    free = np.flatnonzero((shared <= 0.25 * smaller).all(1))
    if len(free) == 0:
        return None
    return tuple(center[free[0]].tolist()), tuple(half[free[0]].tolist())


def compose(world: World, split: str, index: int) -> tuple[bool, np.ndarray, list[Thing], np.random.Generator]:
    """Compose picture `index` of a split.

    Returns:
        (is it day?, centres (M, 2) of the lanterns, things from back to front, the generator that paints them)
    """
    rng = numpy_generator("shapes", RENDERER, world.seed, split, index)
    day = bool(rng.random() < 0.5) or not world.context
    counts = (
        rng.integers(world.objects[0], world.objects[1] + 1),
        rng.integers(world.distractors[0], world.distractors[1] + 1),
    )
    kinds = [True] * counts[0] + [False] * counts[1]
    sides = [_pick_side(world, world.mix if is_object else world.distractor_mix, rng) for is_object in kinds]
    planned = list(zip(sides, kinds, strict=True))
    if world.single_scale is not None:
        # Otherwise all objects would be placed first, and the order of depth would reveal them.
        planned = [planned[i] for i in rng.permutation(len(planned))]
    planned.sort(key=lambda thing: thing[0], reverse=True)  # large things lie behind small ones
    things: list[Thing] = []
    lanterns, reach = lantern_spots(world, rng), LANTERN_RADIUS * world.short_side
    occupied = np.hstack([lanterns - reach, lanterns + reach])
    for side, is_object in planned:
        spot = _place(world, side, occupied, rng)
        if spot is None:
            continue
        center, half = spot
        hue, mark, label = pick_parts(is_object, day, rng)
        body, angle = BODIES[int(rng.integers(len(BODIES)))], rng.uniform(-0.2, 0.2)
        things.append(Thing(body, hue, mark, label, center, half, angle))
        box = [center[0] - half[0], center[1] - half[1], center[0] + half[0], center[1] + half[1]]
        occupied = np.vstack([occupied, box])
    return day, lanterns, things, rng

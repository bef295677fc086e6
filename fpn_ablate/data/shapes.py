"""The generated data set: no download, any size, the same bytes for the same seed.

A small world in which finding an object takes meaning, not only contrast. *Things* are discs, squares, diamonds and
triangles in one of three hues, with one of three marks on them. Whether a thing is an *object* depends on how its parts are
combined and on its surroundings: by day (the lanterns in the picture are yellow) a hue goes with the mark of its own number,
by night (they are cyan) with the next one. A distractor is a thing that would be an object at the other time. Nothing in or
near most things tells the time: the early stages of a backbone, which see some forty pixels, cannot know it; deep ones can.

Sizes: the bounds between small, medium and large are COCO's (32 and 96 px), scaled by the short side over 480, the usual
short side of a COCO image. So "small" means the same share of the picture as it does there.

Only +, -, *, / and comparisons touch arrays, so that the bytes do not depend on the processor's vector library.

Export as COCO JSON and PNG: `python -m fpn_ablate.data.shapes --export DIR`.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from fpn_ablate.data.sample import Sample
from fpn_ablate.seeding import numpy_generator

HUES = ("red", "green", "blue")
MARKS = ("dot", "bar", "post")
BODIES = ("disc", "square", "diamond", "triangle")
COCO_SHORT_SIDE = 480
NUM_CLASSES = len(HUES)
LANTERN_COLOURS = ((255, 225, 60), (60, 225, 255))  # by day, by night
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


# ---------------------------------------------------------------------------------------------------------------- drawing


def _coverage(body: str, u: np.ndarray, v: np.ndarray, pixel: float) -> np.ndarray:
    """Share of each pixel that a body covers; u, v are its own coordinates in -1..1, `pixel` is a pixel's width in them."""
    if body == "disc":
        distance = (u * u + v * v - 1) / 2
    elif body == "square":
        distance = np.maximum(np.abs(u), np.abs(v)) - 0.9
    elif body == "diamond":
        distance = (np.abs(u) + np.abs(v) - 1) * 0.71
    else:  # triangle, apex up
        distance = np.maximum(v - 0.85, (2 * np.abs(u) - v - 1) * 0.45)
    return np.clip(0.5 - distance / pixel, 0, 1)


def _mark_coverage(mark: int, u: np.ndarray, v: np.ndarray, pixel: float) -> np.ndarray:
    """As `_coverage`, but u, v have equal scales: a mark keeps its form on a stretched body."""
    v = v - 0.1  # the middle of a triangle lies lower than that of the other bodies
    if MARKS[mark] == "dot":
        distance = np.maximum(np.abs(u), np.abs(v)) - 0.32
    elif MARKS[mark] == "bar":
        distance = np.maximum(np.abs(u) - 0.62, np.abs(v) - 0.2)
    else:
        distance = np.maximum(np.abs(u) - 0.2, np.abs(v) - 0.62)
    return np.clip(0.5 - distance / pixel, 0, 1)


def _body_colour(hue: int, rng: np.random.Generator) -> np.ndarray:
    colour = rng.uniform(30, 95, 3)
    colour[hue] = rng.uniform(150, 235)
    return colour


def draw(canvas: np.ndarray, owner: np.ndarray, number: int, thing: Thing, rng: np.random.Generator) -> None:
    """Paint a thing on `canvas` (H, W, 3) float32 and enter its number in `owner` (H, W) where it covers most of a pixel."""
    (cx, cy), (a, b) = thing.center, thing.half
    reach = max(a, b) * 1.45 + 2
    height, width = owner.shape
    x0, x1 = max(0, math.floor(cx - reach)), min(width, math.ceil(cx + reach))
    y0, y1 = max(0, math.floor(cy - reach)), min(height, math.ceil(cy + reach))
    x = np.arange(x0, x1, dtype=np.float32)[None, :] + np.float32(0.5 - cx)
    y = np.arange(y0, y1, dtype=np.float32)[:, None] + np.float32(0.5 - cy)
    cos, sin = np.float32(math.cos(thing.angle)), np.float32(math.sin(thing.angle))
    along, across = x * cos + y * sin, y * cos - x * sin
    body = _coverage(thing.body, along / np.float32(a), across / np.float32(b), np.float32(1 / min(a, b)))
    mean = np.float32(math.sqrt(a * b))
    mark = _mark_coverage(thing.mark, along / mean, across / mean, 1 / mean) * body
    bright = 235 if rng.random() < 0.5 else 20  # marks are light or dark, so brightness does not give them away
    window = canvas[y0:y1, x0:x1]
    window += body[..., None] * (_body_colour(thing.hue, rng).astype(np.float32) - window)
    window += mark[..., None] * (np.float32(bright) - window)
    owner[y0:y1, x0:x1][body > 0.5] = number


def _patches(height: int, width: int, cell: int, rng: np.random.Generator) -> np.ndarray:
    """Smooth brightness (H, W) in about -1..1 from random values `cell` pixels apart, interpolated linearly."""
    grid = rng.uniform(-1, 1, (height // cell + 2, width // cell + 2)).astype(np.float32)

    def spread(values: np.ndarray, size: int) -> np.ndarray:
        at = np.arange(size, dtype=np.float32) / np.float32(cell)
        low = at.astype(np.int64)
        share = (at - low)[:, None]
        return values[low] * (1 - share) + values[low + 1] * share

    return spread(spread(grid, height).T, width).T


def background(world: World, rng: np.random.Generator) -> np.ndarray:
    """(H, W, 3) float32: a tint and patches of brightness."""
    cell = max(4, world.short_side // 8)
    grey = world.patches * _patches(world.height, world.width, cell, rng)
    return grey[..., None] + rng.uniform(95, 145, 3).astype(np.float32)


def lantern_spots(world: World, rng: np.random.Generator) -> np.ndarray:
    """(M, 2) centres x, y: one somewhere in each cell of a grid, so that no place is far from all of them."""
    step = world.lanterns * world.short_side
    columns, rows = (max(1, round(side / step)) for side in (world.width, world.height))
    at = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), -1).reshape(-1, 2) + rng.uniform(
        0.15, 0.85, (columns * rows, 2)
    )
    return at * [world.width / columns, world.height / rows]


def draw_lanterns(canvas: np.ndarray, world: World, spots: np.ndarray, day: bool) -> None:
    """Discs in the colour of the time of day."""
    radius = LANTERN_RADIUS * world.short_side
    colour = np.array(LANTERN_COLOURS[0 if day else 1], np.float32)
    for cx, cy in spots:
        x0, y0 = max(0, math.floor(cx - radius - 1)), max(0, math.floor(cy - radius - 1))
        window = canvas[y0 : math.ceil(cy + radius + 1), x0 : math.ceil(cx + radius + 1)]
        y, x = np.ogrid[0 : window.shape[0], 0 : window.shape[1]]
        u, v = np.float32(x + 0.5 + x0 - cx) / np.float32(radius), np.float32(y + 0.5 + y0 - cy) / np.float32(radius)
        window += _coverage("disc", u, v, np.float32(1 / radius))[..., None] * (colour - window)


# -------------------------------------------------------------------------------------------------------------- composing


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


def finish(canvas: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    """Pixel noise, then uint8."""
    noisy = canvas + np.float32(noise) * rng.standard_normal(canvas.shape, dtype=np.float32)
    return np.clip(noisy + np.float32(0.5), 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Picture:
    """A rendered picture. `masks[i]` (H, W) bool shows the visible pixels of `labels[i]`; distractors are not listed."""

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    masks: np.ndarray


def render(world: World, split: str, index: int) -> Picture:
    """Picture `index` of a split: a pure function of its arguments."""
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
    """XYXY of the pixels that are set; the far edge is one past the last pixel."""
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1


# --------------------------------------------------------------------------------------------------------------- data set


class ShapesDataset:
    """`size` pictures of a split. Each is rendered when it is first asked for and kept (0.1 MB at 192 x 192)."""

    generated = True
    name = "shapes"

    def __init__(self, world: World, split: str, size: int) -> None:
        self.world, self.split, self.size = world, split, size
        self.categories: Sequence[dict[str, Any]] = [{"id": k + 1, "name": hue} for k, hue in enumerate(HUES)]
        self.image_ids = list(range(1, size + 1))
        self.area_bounds = (world.bounds[0] ** 2, world.bounds[1] ** 2)
        facts = json.dumps([RENDERER, asdict(world), split, size], sort_keys=True)
        self.digest = hashlib.sha256(facts.encode()).hexdigest()
        self._samples: dict[int, tuple[Sample, np.ndarray]] = {}

    def __len__(self) -> int:
        return self.size

    def _sample(self, index: int) -> tuple[Sample, np.ndarray]:
        if index not in self._samples:
            self._samples[index] = _render_sample(self.world, self.split, index)
        return self._samples[index]

    def render_all(self, workers: int) -> None:
        """Render what is missing now, in `workers` processes: a GPU must not wait for pictures."""
        missing = [index for index in range(self.size) if index not in self._samples]
        if workers and missing:
            arguments = [(self.world, self.split, index) for index in missing]
            with get_context("spawn").Pool(min(workers, len(missing))) as pool:
                self._samples.update(zip(missing, pool.starmap(_render_sample, arguments, chunksize=8), strict=True))

    def __getitem__(self, index: int) -> Sample:
        return self._sample(index)[0]

    def coco(self) -> dict[str, Any]:
        """COCO instances without segmentations (`export` writes those); `area` counts visible pixels, as in COCO."""
        return self._ground_truth

    @cached_property
    def _ground_truth(self) -> dict[str, Any]:
        images, annotations = [], []
        for index, image_id in enumerate(self.image_ids):
            sample, areas = self._sample(index)
            images.append(_image_entry(self.world, image_id))
            annotations += _annotations(image_id, sample.boxes, sample.labels, areas, len(annotations) + 1)
        return {"images": images, "annotations": annotations, "categories": list(self.categories)}


def _render_sample(world: World, split: str, index: int) -> tuple[Sample, np.ndarray]:
    """A picture as a sample, and the visible area of each object."""
    picture = render(world, split, index)
    crowd = np.zeros(len(picture.labels), bool)
    return Sample(picture.image, picture.boxes, picture.labels, crowd, index + 1), picture.masks.sum((1, 2))


def _image_entry(world: World, image_id: int) -> dict[str, Any]:
    return {"id": image_id, "file_name": f"{image_id:06d}.png", "height": world.height, "width": world.width}


def _annotations(
    image_id: int, boxes: np.ndarray, labels: np.ndarray, areas: np.ndarray, first_id: int
) -> list[dict[str, Any]]:
    return [
        {
            "id": first_id + i,
            "image_id": image_id,
            "category_id": int(labels[i]),
            "bbox": [float(x0), float(y0), float(x1 - x0), float(y1 - y0)],
            "area": float(areas[i]),
            "iscrowd": 0,
        }
        for i, (x0, y0, x1, y1) in enumerate(boxes)
    ]


@lru_cache(maxsize=4)
def load(world: World, train_images: int, val_images: int) -> tuple[ShapesDataset, ShapesDataset]:
    """Training and validation split. Kept in the process, so that the rows of a sweep render each picture once."""
    return ShapesDataset(world, "train", train_images), ShapesDataset(world, "val", val_images)


def size_counts(dataset: ShapesDataset) -> dict[str, int]:
    """Objects by size, for the record and for the README."""
    low, high = dataset.area_bounds
    areas = np.array([a["area"] for a in dataset.coco()["annotations"]])
    return {
        "small": int((areas < low).sum()),
        "medium": int(((areas >= low) & (areas <= high)).sum()),
        "large": int((areas > high).sum()),
    }


# ------------------------------------------------------------------------------------------------------- classification


NUM_KINDS = 2 * 2 * NUM_CLASSES


def classification_picture(world: World, index: int) -> tuple[np.ndarray, int]:
    """One thing of any size on a background of the same world, and its kind: hue, which of its two marks, time of day.

    For pre-training a backbone, as ImageNet does for photographs. Half of the kinds are objects, half are distractors.
    """
    rng = numpy_generator("classify", RENDERER, world.seed, index)
    day, is_object = bool(rng.random() < 0.5) or not world.context, bool(rng.random() < 0.5)
    hue, mark, _ = pick_parts(is_object, day, rng)
    kind = hue + NUM_CLASSES * (is_object + 2 * day)
    # Even on the log scale, from the shortest side of a thing up to what the picture holds.
    low, high = (share * world.short_side for share in world.extent)
    side = math.exp(rng.uniform(math.log(low), math.log(min(high, 0.9 * min(world.height, world.width)))))
    stretch = math.exp(rng.uniform(-0.35, 0.35))
    half = side / 2 * stretch, side / 2 / stretch
    # A stretched thing may be larger than the picture; its centre stays at least a quarter inside.
    center = tuple(
        rng.uniform(min(h, 0.25 * s), max(s - h, 0.75 * s)) for h, s in zip(half, (world.width, world.height), strict=True)
    )
    thing = Thing(BODIES[int(rng.integers(len(BODIES)))], hue, mark, 0, center, half, rng.uniform(-0.2, 0.2))
    canvas = background(world, rng)
    lanterns = lantern_spots(world, rng)
    draw_lanterns(canvas, world, lanterns, day)
    draw(canvas, np.zeros(canvas.shape[:2], np.int32), 1, thing, rng)
    return finish(canvas, world.noise, rng), kind


# ----------------------------------------------------------------------------------------------------------------- export


def export(world: World, sizes: dict[str, int], folder: Path) -> None:
    """Write `annotations/instances_<split>.json` with RLE masks and `<split>/*.png`, readable by any COCO code base."""
    from PIL import Image
    from pycocotools import mask as rle

    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for split, size in sizes.items():
        dataset = ShapesDataset(world, split, size)
        (folder / split).mkdir(exist_ok=True)
        truth: dict[str, Any] = {"images": [], "annotations": [], "categories": list(dataset.categories)}
        for index, image_id in enumerate(dataset.image_ids):
            picture = render(world, split, index)
            entry = _image_entry(world, image_id)
            Image.fromarray(picture.image).save(folder / split / entry["file_name"])
            rows = _annotations(
                image_id, picture.boxes, picture.labels, picture.masks.sum((1, 2)), len(truth["annotations"]) + 1
            )
            for row, mask in zip(rows, picture.masks, strict=True):
                code = rle.encode(np.asfortranarray(mask))
                row["segmentation"] = {"size": code["size"], "counts": code["counts"].decode()}
            truth["images"].append(entry)
            truth["annotations"] += rows
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(truth))


def main(argv: Sequence[str] | None = None) -> None:
    import argparse

    parser = argparse.ArgumentParser(prog="python -m fpn_ablate.data.shapes", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--export", type=Path, required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--train", type=int, default=1000, help="training pictures (default %(default)s)")
    parser.add_argument("--val", type=int, default=250, help="validation pictures (default %(default)s)")
    parser.add_argument("--size", type=int, default=192, help="height and width in pixels (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the world (default %(default)s)")
    args = parser.parse_args(argv)
    world = World(height=args.size, width=args.size, seed=args.seed)
    export(world, {"train": args.train, "val": args.val}, args.export)
    print(f"wrote {args.train} + {args.val} pictures to {args.export}")


if __name__ == "__main__":
    main()

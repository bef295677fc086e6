"""Paint pictures. Arrays see only +, -, *, / and comparisons, so that the bytes do not depend on a CPU's vector library."""

import math

import numpy as np

from fpn_ablate.data.shapes.world import LANTERN_RADIUS, MARKS, Thing, World

LANTERN_COLOURS = ((255, 225, 60), (60, 225, 255))  # by day, by night


def _coverage(body: str, u: np.ndarray, v: np.ndarray, pixel: float) -> np.ndarray:
    """Return the share of each pixel that a body covers; u, v are its coordinates in -1..1, `pixel` a pixel's width in them."""
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
    """Return the share of each pixel that a mark covers; u and v have equal scales, so that a stretched body keeps its mark."""
    v = v - 0.1  # the centre of a triangle is lower than that of the other bodies
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
    """Paint a thing on `canvas` (H, W, 3) float32; write its number to `owner` (H, W) where it covers over half of a pixel."""
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
    bright = 235 if rng.random() < 0.5 else 20  # marks are light or dark, so that brightness does not reveal them
    window = canvas[y0:y1, x0:x1]
    window += body[..., None] * (_body_colour(thing.hue, rng).astype(np.float32) - window)
    window += mark[..., None] * (np.float32(bright) - window)
    owner[y0:y1, x0:x1][body > 0.5] = number


def _patches(height: int, width: int, cell: int, rng: np.random.Generator) -> np.ndarray:
    """Return smooth brightness (H, W), about -1..1: random values `cell` pixels apart, interpolated linearly."""
    grid = rng.uniform(-1, 1, (height // cell + 2, width // cell + 2)).astype(np.float32)

    def spread(values: np.ndarray, size: int) -> np.ndarray:
        at = np.arange(size, dtype=np.float32) / np.float32(cell)
        low = at.astype(np.int64)
        share = (at - low)[:, None]
        return values[low] * (1 - share) + values[low + 1] * share

    return spread(spread(grid, height).T, width).T


def background(world: World, rng: np.random.Generator) -> np.ndarray:
    """Paint an empty picture (H, W, 3) float64: a tint and patches of brightness."""
    cell = max(4, world.short_side // 8)
    grey = world.patches * _patches(world.height, world.width, cell, rng)
    tint = rng.uniform(95, 145, 3).astype(np.float32)
    return (grey + tint[:, None, None]).transpose(1, 2, 0)  # a colour's pixels lie together: numpy's inner loops are long


def draw_lanterns(canvas: np.ndarray, world: World, spots: np.ndarray, day: bool) -> None:
    """Paint lanterns: discs in the colour of the time of day."""
    radius = LANTERN_RADIUS * world.short_side
    colour = np.array(LANTERN_COLOURS[0 if day else 1], np.float32)
    for cx, cy in spots:
        x0, y0 = max(0, math.floor(cx - radius - 1)), max(0, math.floor(cy - radius - 1))
        window = canvas[y0 : math.ceil(cy + radius + 1), x0 : math.ceil(cx + radius + 1)]
        y, x = np.ogrid[0 : window.shape[0], 0 : window.shape[1]]
        u, v = np.float32(x + 0.5 + x0 - cx) / np.float32(radius), np.float32(y + 0.5 + y0 - cy) / np.float32(radius)
        window += _coverage("disc", u, v, np.float32(1 / radius))[..., None] * (colour - window)


def finish(canvas: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    """Add pixel noise and convert to uint8."""
    grain = rng.standard_normal(canvas.shape, dtype=np.float32)
    grain *= np.float32(noise)
    noisy = np.add(canvas, grain, order="C")
    noisy += np.float32(0.5)
    return np.clip(noisy, 0, 255, out=noisy).astype(np.uint8)

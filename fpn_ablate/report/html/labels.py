"""Place the labels of a scatter plot so that they overlap neither each other nor the points."""

from collections.abc import Sequence
from typing import Any

LABEL_FONT = 11  # pixels
LETTER, LINE, POINT = 5.9, 13, 6  # pixels: width of a letter, height of a line, half of a point
HEIGHT, WIDTHS = 230, (500, 250)  # of the plot: on a desk and on a telephone; on a wider one labels are further apart
NARROW = 460  # below this width of a plot the second places count
# Where a label may stand beside its point, best first: side, dx, dy. Further away nobody would know whose it is.
PLACES = [
    (side, dx if side == "left" else -dx, dy)
    for dx, dy in ((8, 0), (6, -11), (6, 12), (6, -22), (6, 23), (6, -33), (6, 34))
    for side in ("left", "right")
]
Box = tuple[float, float, float, float]


def place_labels(points: Sequence[dict[str, Any]]) -> None:
    """Give each point the `places` of its label `short` at both WIDTHS: [the text's alignment, dx, dy]; [] without any room.

    The points have `value` (across) and `mean`, `low`, `high` (upwards); None for an interval that is not known.
    """
    for point in points:
        point["places"] = []
    for width in WIDTHS if points else ():
        for point, place in zip(points, _placed(points, width), strict=True):
            point["places"].append(place)


def _placed(points: Sequence[dict[str, Any]], plot_width: float) -> list[list[Any]]:
    across = [point["value"] for point in points]
    ends = [end for point in points for end in (point["mean"], point["low"], point["high"]) if end is not None]
    x = [16 + _share(value, across) * (plot_width - 32) for value in across]
    y = [HEIGHT - _share(point["mean"], ends) * HEIGHT for point in points]
    taken: list[Box] = [(a - POINT, b - POINT, a + POINT, b + POINT) for a, b in zip(x, y, strict=True)]
    placed: list[list[Any]] = []
    for n, point in enumerate(points):
        width = min(170, LETTER * len(point["short"]))
        placed.append([])
        roomier = "left" if x[n] < plot_width / 2 else "right"
        for side, dx, dy in sorted(PLACES, key=lambda place: (abs(place[2]) // 10, place[0] != roomier)):
            left = x[n] + dx - (width if side == "right" else 0)
            box = left, y[n] + dy - LINE / 2, left + width, y[n] + dy + LINE / 2
            inside = box[0] > -4 and box[2] < plot_width + 4 and box[1] > -LINE and box[3] < HEIGHT + LINE
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                placed[-1] = [side, dx, dy]
                break
    return placed


def _share(value: float, values: Sequence[float]) -> float:
    low, high = min(values), max(values)
    return (value - low) / (high - low) if high > low else 0.5


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]

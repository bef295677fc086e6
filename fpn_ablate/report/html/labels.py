"""Place the labels of a scatter plot so that they overlap neither each other nor the points."""

from typing import Any

LABEL_FONT = 11  # pixels
LETTER, LINE, POINT = 5.9, 13, 6  # pixels: width of a letter, height of a line, half of a point
# Of the plot, as on a telephone: on a wider one labels are further apart.
WIDTH, HEIGHT = 340, 230
# Where a label may stand beside its point, best first: side, dx, dy. The last is far enough for a cluster of points.
PLACES = [
    (side, dx if side == "left" else -dx, dy)
    for dx, dy in ((8, 0), (6, -11), (6, 12), (6, -22), (6, 23), (6, -34), (6, 35), (6, -46), (6, 47), (6, -58), (6, 59))
    for side in ("left", "right")
]
Box = tuple[float, float, float, float]


def place_labels(points: list[dict[str, Any]]) -> None:
    """Give each point `side` (the text's alignment), `dx` and `dy` of its label `short`; one without any room loses its label.

    The points have `value` (across) and `mean`, `low`, `high` (upwards); None for an interval that is not known.
    """
    if not points:
        return
    across = [point["value"] for point in points]
    ends = [end for point in points for end in (point["mean"], point["low"], point["high"]) if end is not None]
    x = [16 + _share(value, across) * (WIDTH - 32) for value in across]
    y = [HEIGHT - _share(point["mean"], ends) * HEIGHT for point in points]
    taken: list[Box] = [(a - POINT, b - POINT, a + POINT, b + POINT) for a, b in zip(x, y, strict=True)]
    for n, point in enumerate(points):
        width = min(170, LETTER * len(point["short"]))
        places = sorted(PLACES, key=lambda place: (place[0] == "right") == (x[n] < WIDTH / 2))  # first where there is more room
        for side, dx, dy in sorted(places, key=lambda place: abs(place[2])):
            left = x[n] + dx - (width if side == "right" else 0)
            box = left, y[n] + dy - LINE / 2, left + width, y[n] + dy + LINE / 2
            inside = box[0] > -4 and box[2] < WIDTH + 4 and box[1] > -LINE and box[3] < HEIGHT + LINE
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                point |= {"side": side, "dx": dx, "dy": dy}
                break
        else:
            point |= {"side": "left", "dx": 0, "dy": 0, "short": ""}


def _share(value: float, values: list[float]) -> float:
    low, high = min(values), max(values)
    return (value - low) / (high - low) if high > low else 0.5


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]

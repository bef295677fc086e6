"""Which boxes and masks pictures show: of an image the best proposals, and the detections of a high score."""

from collections.abc import Sequence

from fpn_ablate.utils import rle

MAX_PROPOSALS = 20  # their scores are not comparable with a detection's
MIN_SCORE = 0.5
# Twenty masks on top of each other hide the picture. Of segment proposals those are shown that find the objects, if they are
# among the best 100, which AR@100 counts.
MATCHED_PROPOSALS = 100


def closest(objects: Sequence[bytes], masks: Sequence[bytes], size: rle.Size) -> list[int]:
    """Return the positions, rising, of the masks that overlap some object more than the others do, by IoU.

    Raises:
        ValueError: a mask is damaged.
    """
    for counts in (*objects, *masks):
        rle.decode([counts], size)  # refuses damaged masks, on which pycocotools' IoU may not end
    overlaps = rle.iou(objects, masks, size)  # (G, P)
    if not masks:
        return []
    return sorted({int(row.argmax()) for row in overlaps if row.max() > 0})

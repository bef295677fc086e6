"""Findings of the checks of a COCO-format set: their kinds, how severe they are, and their fixes."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from fpn_ablate.utils.errors import printable

BROKEN, BOX, NOTE = "error", "box", "note"
REPLACE = "replace the file (copy or download it again), or remove the image and its annotations from the JSON"
# kind: (level, fix). BROKEN is always refused; BOX can be clipped or dropped on request; NOTE is harmless.
KINDS = {
    "annotations-missing": (BROKEN, "give the path of a readable COCO instances JSON file"),
    "annotations-not-json": (BROKEN, "write or download the annotation file again: it is not JSON, or not complete"),
    "structure": (BROKEN, "write an object with non-empty lists `images` and `categories`, and a list `annotations`"),
    "missing-key": (BROKEN, "add the key to the entry"),
    "duplicate-key": (BROKEN, "remove all but one of the equal keys: JSON readers would use the last value"),
    "wrong-type": (BROKEN, "write the value in the type that the COCO format prescribes"),
    "non-finite": (BROKEN, "replace NaN, Infinity or a number too large for floating point by a finite number"),
    "duplicate-image-id": (BROKEN, "give each image its own id"),
    "duplicate-category-id": (BROKEN, "give each category its own id"),
    "unknown-category": (BROKEN, "add the category to `categories`, or correct `category_id`"),
    "unknown-image": (BROKEN, "add the image to `images`, or remove the annotation"),
    "path-escape": (BROKEN, "write `file_name` relative to the image folder, without `..`"),
    "link-outside": (BROKEN, "set data.links=true (doctor FILE: --links) if you trust the links, or copy the files (cp -rL)"),
    "file-names": (BROKEN, "correct `file_name`, or set data.train.images or data.val.images, from which it counts"),
    "images-missing": (BROKEN, "give the folder that holds the image files"),
    "image-missing": (BROKEN, "put the file there, correct `file_name`, or remove the image and its annotations"),
    "image-unreadable": (BROKEN, REPLACE),
    "image-truncated": (BROKEN, REPLACE),
    "image-too-large": (BROKEN, "cut the picture into tiles, each with its annotations"),
    "image-mode": (BROKEN, "convert the picture to 8-bit RGB or grey"),
    "image-size": (BROKEN, "correct `width` and `height`, or restore the picture that was annotated"),
    "boxes-normalised": (BROKEN, "multiply by the image's width and height: COCO's boxes are [x, y, width, height] in pixels"),
    "box-outside": (BOX, "correct the box, or set `data.invalid=clip` (or `drop`)"),
    "box-empty": (BOX, "correct the box ([x, y, width, height]), or set `data.invalid=drop` (or `clip`, which drops it too)"),
    "box-rounded": (NOTE, "none needed: a box up to 1 px over the border is clipped"),
    "area-missing": (NOTE, "none needed: width x height of the box is used"),
    "area-unlike-box": (
        NOTE,
        "write the object's pixels; width x height of the box is used, as for small, medium and large",
    ),
    "ignore-flag": (NOTE, "none needed: they are treated like crowd regions (COCO's own evaluator reads `iscrowd` alone)"),
    "mended": (NOTE, "none needed: it has one meaning"),
    "masks-missing": (BROKEN, "annotate `segmentation`, or choose a task of boxes alone"),
    "mask-size": (BROKEN, "write [height, width] of the image to `size`"),
    "mask-counts": (BROKEN, "encode the mask again: `counts` are runs down the columns that sum to height x width"),
    "mask-missing": (BOX, "annotate `segmentation`, or set `data.invalid=drop` (or `clip`, which drops the object too)"),
    "mask-empty": (BOX, "correct the mask, or set `data.invalid=drop` (or `clip`, which drops the object too)"),
    "mask-points": (BOX, "correct the polygon, or set `data.invalid=clip` to leave it out (or `drop`, the whole object)"),
    "mask-outside": (BOX, "correct the polygon, or set `data.invalid=clip` (or `drop`)"),
    "mask-rounded": (NOTE, "none needed: a polygon up to 1 px over the border is clipped"),
    "mask-crossing": (NOTE, "none needed: as in COCO's API, inside is what an odd number of lines separates from outside"),
    "mask-unlike-box": (NOTE, "correct `bbox` or `segmentation`: both are used as they are"),
    "image-dark": (
        NOTE,
        "stretch the values to 0..65535: that range is scaled to 0..255, however little of it is used",
    ),
}


@dataclass
class Finding:
    """A problem: its place, the value found there, and its fix."""

    kind: str  # a key of KINDS
    file: str  # the image file if the problem concerns one, otherwise the annotation file
    image_id: int | None = None
    annotation_id: int | None = None
    value: str = ""
    count: int = 1  # problems that it represents

    @property
    def level(self) -> str:
        """Return BROKEN, BOX or NOTE."""
        return KINDS[self.kind][0]

    @property
    def fix(self) -> str:
        return KINDS[self.kind][1]

    def __str__(self) -> str:
        ids = [f"{item} id {n}" for item, n in (("image", self.image_id), ("annotation", self.annotation_id)) if n is not None]
        more = f", and {self.count - 1:,} more" if self.count > 1 else ""
        return printable(f"{self.kind}: {', '.join([self.file, *ids])}: {self.value}{more}. Fix: {self.fix}")


class Findings(list[Finding]):
    """The first LIMIT findings of each kind; the last of them counts all further ones, so that memory stays bounded."""

    LIMIT = 10_000

    def __init__(self) -> None:
        super().__init__()
        self._by_kind: dict[str, list[Finding]] = defaultdict(list)

    def append(self, finding: Finding) -> None:
        kept = self._by_kind[finding.kind]
        if len(kept) < self.LIMIT:
            kept.append(finding)
            super().append(finding)
        else:
            kept[-1].count += finding.count

    def extend(self, findings: Iterable[Finding]) -> None:
        for finding in findings:
            self.append(finding)

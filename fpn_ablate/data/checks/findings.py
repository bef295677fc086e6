"""What the checks of a COCO-format set can find, how grave it is, and how to mend it."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from fpn_ablate.utils.errors import printable

BROKEN, BOX, NOTE = "error", "box", "note"
REPLACE = "replace the file (copy or download it again), or remove the image and its annotations from the JSON"
# kind: (level, fix). BROKEN is always refused; BOX can be clipped or dropped on request; NOTE does no harm here.
KINDS = {
    "annotations-missing": (BROKEN, "give the path of a readable COCO instances JSON file"),
    "annotations-not-json": (BROKEN, "write the annotation file again, or download it again: it is not (whole) JSON"),
    "structure": (
        BROKEN,
        "write an object with the non-empty lists `images` and `categories` and the list `annotations`",
    ),
    "missing-key": (BROKEN, "add the key to the entry"),
    "duplicate-key": (BROKEN, "leave the key in the object once: of several values the last alone would count"),
    "wrong-type": (BROKEN, "write the value in the type that the COCO format prescribes"),
    "non-finite": (BROKEN, "replace NaN, Infinity or a number beyond floating point by a finite number"),
    "duplicate-image-id": (BROKEN, "give each image an id of its own"),
    "duplicate-annotation-id": (BROKEN, "give each annotation an id of its own"),
    "duplicate-category-id": (BROKEN, "give each category an id of its own"),
    "unknown-category": (BROKEN, "add the category to `categories`, or correct `category_id`"),
    "unknown-image": (BROKEN, "add the image to `images`, or remove the annotation"),
    "path-escape": (
        BROKEN,
        "write `file_name` relative to the image folder, without `..` and without links that lead out of it",
    ),
    "images-missing": (BROKEN, "give the folder that holds the image files"),
    "image-missing": (BROKEN, "put the file there, correct `file_name`, or remove the image and its annotations"),
    "image-unreadable": (BROKEN, REPLACE),
    "image-truncated": (BROKEN, REPLACE),
    "image-mode": (BROKEN, "convert the picture to 8-bit RGB or grey"),
    "image-size": (BROKEN, "correct `width` and `height`, or put back the picture that was annotated"),
    "box-outside": (BOX, "correct the box, or set `data.invalid=clip` (or `drop`)"),
    "box-empty": (
        BOX,
        "correct the box ([x, y, width, height]), or set `data.invalid=drop` (or `clip`, which drops it too)",
    ),
    "box-rounded": (NOTE, "none needed: a box up to 1 px over the border is clipped"),
    "annotation-id-zero": (
        NOTE,
        "none needed here: the evaluation uses another id; pycocotools counts id 0 as never found",
    ),
    "area-missing": (NOTE, "none needed: width x height of the box is used"),
}


@dataclass(frozen=True)
class Finding:
    """One problem: where it is, what was found, and how to mend it."""

    kind: str  # a key of KINDS
    file: str  # the image file where one is concerned, otherwise the annotation file
    image_id: int | None = None
    annotation_id: int | None = None
    value: str = ""
    count: int = 1  # how many problems it stands for

    @property
    def level(self) -> str:
        return KINDS[self.kind][0]

    @property
    def fix(self) -> str:
        return KINDS[self.kind][1]

    def __str__(self) -> str:
        ids = [f"{what} id {n}" for what, n in (("image", self.image_id), ("annotation", self.annotation_id)) if n is not None]
        more = f", and {self.count - 1:,} more" if self.count > 1 else ""
        return printable(f"{self.kind}: {', '.join([self.file, *ids])}: {self.value}{more}. Fix: {self.fix}")


class Findings(list[Finding]):
    """Of each kind the first MOST, the last of which counts for all that follow: a file of rubbish costs no memory."""

    MOST = 10_000

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[str, int] = {}
        self._kept: Counter[str] = Counter()

    def append(self, finding: Finding) -> None:
        if self._kept[finding.kind] < self.MOST:
            self._kept[finding.kind] += 1
            self._last[finding.kind] = len(self)
            super().append(finding)
        else:
            at = self._last[finding.kind]
            self[at] = replace(self[at], count=self[at].count + finding.count)

    def extend(self, findings: Iterable[Finding]) -> None:
        for finding in findings:
            self.append(finding)

"""Check a COCO-format set before a training starts: find every problem of its annotations, boxes and images.

`CocoDataset` refuses a set by these findings, and `python -m fpn_ablate doctor` prints them. Each finding names file, image id,
annotation id, value and fix. Images are checked by their header and their last bytes (see `images.probe` for what that misses).

Boxes at the border: real sets exceed the image by up to 1 px through rounding (1-based or inclusive coordinates). Such a box is
clipped and counted in a note, as long as something of it remains. Beyond 1 px it is an error, for the user to decide.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np

from fpn_ablate.data.checks import images as image_files
from fpn_ablate.data.checks.annotations import Annotations, read
from fpn_ablate.data.checks.findings import BOX, BROKEN, Finding, Findings

ROUNDING = 1.0  # pixels beyond the image that count as rounding
NOISE = 1e-3  # pixels; a smaller excess comes from floating-point arithmetic and is not noted
SAMPLED = 20  # pictures looked at for 16 bits that are not used
DARK = 2**14  # above the values of 14-bit cameras: a quarter of the range
THIN = 0.01  # pixels; COCO writes two decimals, and float32 loses a thinner box in a large picture


@dataclass(frozen=True)
class Report:
    """The findings of a set, and its parsed annotations (None if they cannot be parsed). Generated pictures have no paths."""

    annotations_file: str | None
    image_folder: str | None
    findings: list[Finding]
    annotations: Annotations | None
    file_bytes: np.ndarray | None  # (N,) int64, 0 for a missing file; None: the images were not checked
    links: bool = False  # links out of the folder are followed
    masks: bool = False  # masks were read

    def at(self, *levels: str) -> list[Finding]:
        """Return the findings of these levels (BROKEN, BOX, NOTE)."""
        return [finding for finding in self.findings if finding.level in levels]

    def refused(self, invalid: str = "error") -> list[Finding]:
        """Return the findings for which a run with data.invalid=`invalid` would be refused."""
        return self.at(BROKEN, BOX) if invalid == "error" else self.at(BROKEN)

    @property
    def sound(self) -> bool:
        """Return whether a training would start with the default settings."""
        return not self.refused()


def examine(annotations: Path | str, images: Path | str | None = None, links: bool = False, masks: bool = False) -> Report:
    """Check an annotation file and, if `images` is given, the image files in that folder. Never raises on bad content.

    Args:
        links: follow links out of the folder.
        masks: read and check the masks too.
    """
    table, findings = read(Path(annotations), masks)
    file, folder, file_bytes = str(annotations), None if images is None else str(images), None
    if folder is not None and not os.path.isdir(folder):
        findings.append(Finding("images-missing", folder, value="no such folder"))
    elif folder is not None and table is not None:
        file_bytes = _check_images(table, file, folder, links, findings)
    if table is not None:
        _check_boxes(table, folder, file, findings)
    return Report(file, folder, findings, table, file_bytes, links, masks)


def summary(findings: list[Finding], limit: int) -> str:
    """Format the counts by kind and up to `limit` findings, taking turns among the kinds, so that rare ones are not hidden."""
    by_kind: dict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        by_kind[finding.kind].append(finding)
    turns = [finding for turn in zip_longest(*by_kind.values()) for finding in turn if finding]
    listed, omitted = turns[:limit], sum(finding.count for finding in turns) - sum(finding.count for finding in turns[:limit])
    head = ", ".join(f"{count} {kind}" for kind, count in counts(findings).items())
    return "\n".join([head, *(f"  {finding}" for finding in listed), *([f"... and {omitted} more"] if omitted else [])])


def counts(findings: Iterable[Finding]) -> dict[str, int]:
    """Count the problems of each kind."""
    by_kind: Counter[str] = Counter()
    for finding in findings:
        by_kind[finding.kind] += finding.count
    return dict(by_kind)


def excess(table: Annotations) -> np.ndarray:
    """Return how far each box exceeds its image, (M,) in pixels; negative inside."""
    x, y, w, h = table.boxes.T
    height, width = table.sizes[table.image_index].T
    with np.errstate(over="ignore"):
        return np.max([-x, -y, x + w - width, y + h - height], axis=0)


def clipped(table: Annotations) -> np.ndarray:
    """Return the boxes cut to their images, (M, 4) as x, y, width, height; thin or negative if nothing remains."""
    x, y, w, h = table.boxes.T
    height, width = table.sizes[table.image_index].T
    x0, y0 = np.clip(x, 0, width), np.clip(y, 0, height)
    with np.errstate(over="ignore"):
        cut = np.stack([x0, y0, np.clip(x + w, 0, width) - x0, np.clip(y + h, 0, height) - y0], axis=1)
    # x + w - x differs from w by rounding: a box inside keeps the numbers of its file.
    return np.where((excess(table) > 0)[:, None], cut, table.boxes)


def is_empty(boxes: np.ndarray) -> np.ndarray:
    """Return (M,) bool: which boxes have zero, negative or vanishing width or height."""
    return (boxes[:, 2:] < THIN).any(axis=1)


def is_normalised(table: Annotations) -> bool:
    """Return whether all boxes have the numbers of fractions, and the images are larger than that."""
    boxes = table.boxes
    return len(boxes) > 0 and bool((abs(boxes - 0.5) <= 0.55).all() and boxes[:, 2:].any() and (table.sizes > 2).all())


def box_kinds(table: Annotations) -> dict[str, np.ndarray]:
    """Return (M,) bool for each kind of bad box. A box is of one kind at most; without a known image only its size counts."""
    empty = is_empty(table.boxes)
    over = np.where(empty | (table.image_index < 0), -1.0, excess(table))
    outside = (over > ROUNDING) | ((over > 0) & is_empty(clipped(table)))
    return {"box-empty": empty, "box-outside": outside, "box-rounded": (over > NOISE) & ~outside}


def _check_boxes(table: Annotations, folder: str | None, file: str, findings: list[Finding]) -> None:
    if not len(table.image_ids):
        return
    if is_normalised(table):
        box = ", ".join(f"{side:.3g}" for side in table.boxes[0])
        value = f"every box lies within 0..1, as [{box}]: they look like fractions of the image"
        findings.append(Finding("boxes-normalised", file, value=value))
        return
    for kind, mask in box_kinds(table).items():
        for m in np.flatnonzero(mask):
            n = table.image_index[m]
            height, width = table.sizes[n]
            where = file if folder is None or n < 0 else os.path.join(folder, table.file_names[n])
            image_id = None if n < 0 else int(table.image_ids[n])
            value = f"box {table.boxes[m].tolist()} in an image of {width}x{height}"
            findings.append(Finding(kind, where, image_id, int(table.ids[m]), value))


def _check_images(table: Annotations, file: str, folder: str, links: bool, findings: list[Finding]) -> np.ndarray:
    root = os.path.realpath(folder)
    file_bytes = np.zeros(len(table.image_ids), dtype=np.int64)
    problems, hints, peaks = Findings(), 0, list[int | None]()
    for n, (image_id, name) in enumerate(zip(table.image_ids.tolist(), table.file_names, strict=True)):
        path = image_files.locate(root, name, links)
        if path is not None:
            width, height = int(table.sizes[n, 1]), int(table.sizes[n, 0])
            file_bytes[n], kind, value = image_files.probe(path, width, height)
        elif image_files.locate(root, name, links=True):
            kind, value = "link-outside", f"{name!a} is a link to {os.path.realpath(os.path.join(root, name))}"
        else:
            kind, value = "path-escape", f"`file_name` is {name!a}"
        if kind in ("path-escape", "image-missing") and (meant := image_files.nearest(root, name)):
            value, hints = f"{value}; {meant!a} is there", hints + 1
        if kind:
            problems.append(Finding(kind, file if path is None else path, image_id, value=value))
        elif len(peaks) < SAMPLED:
            peaks.append(image_files.grey16_peak(path))
    if hints and hints == len(table.image_ids):  # all names fail alike
        name, reason = table.file_names[0], "no such file"
        if "\\" in name:
            reason = "`\\` separates no folders here"
        above = os.path.dirname(os.path.abspath(folder))
        if os.path.isfile(image_files.locate(os.path.realpath(above), name) or ""):
            reason += f", but it is there from {above} on"
        value = f"`file_name` {name!a}: {reason}; below {folder}, {image_files.nearest(root, name)!a} is there"
        problems = [Finding("file-names", file, value=value, count=hints)]
    if peaks and None not in peaks and max(peaks) < DARK:
        value = (
            f"the first {len(peaks)} pictures of 16 bits have values up to {max(peaks)} of 65535: the network sees them dark"
        )
        problems.append(Finding("image-dark", folder, value=value))
    findings.extend(problems)
    return file_bytes

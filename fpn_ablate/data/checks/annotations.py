"""Parse a COCO instances file into compact arrays, and note every fault of its structure.

N images, M annotations, K categories. The arrays of COCO's training set need a tenth of the memory of its dictionaries.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from fpn_ablate.data.checks.findings import Finding, Findings
from fpn_ablate.utils.errors import short_repr


@dataclass(frozen=True)
class Annotations:
    """The entries of a file whose values are valid, in the file's order."""

    categories: list[dict[str, Any]]  # K x {"id", "name"}, sorted by id: position k is label k + 1
    image_ids: np.ndarray  # (N,) int64
    file_names: list[str]  # N
    sizes: np.ndarray  # (N, 2) int64: height, width
    ids: np.ndarray  # (M,) int64
    image_index: np.ndarray  # (M,) int64: position in image_ids; -1 where the image is unknown
    labels: np.ndarray  # (M,) int64, 1..K; 0 where the category is unknown
    boxes: np.ndarray  # (M, 4) float64: x, y, width, height as in the file
    areas: np.ndarray  # (M,) float64
    crowd: np.ndarray  # (M,) bool
    generated: bool = False  # the file says that its pictures are drawn by a program

    def select(self, rows: np.ndarray) -> "Annotations":
        """Keep these annotations (positions, or a mask), and all images."""
        columns = ("ids", "image_index", "labels", "boxes", "areas", "crowd")
        return replace(self, **{column: getattr(self, column)[rows] for column in columns})

    def used_images(self, keep_empty: bool) -> np.ndarray:
        """Return (N,) bool: the images that a run uses; without `keep_empty` those with an object that is no crowd region."""
        objects = np.bincount(self.image_index[~self.crowd], minlength=len(self.image_ids))
        return (objects > 0) | keep_empty


# Evaluators store ids as float64, which rounds integers beyond 2^53.
Id = Annotated[int, Field(strict=True, ge=-(2**53), le=2**53)]
Side = Annotated[int, Field(strict=True, ge=1, le=2**53)]
Text = Annotated[str, Field(strict=True, min_length=1)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


@dataclass(slots=True)
class _Category:
    id: Id
    name: Text


@dataclass(slots=True)
class _Image:
    id: Id
    file_name: Text
    height: Side
    width: Side


@dataclass(slots=True)
class _Annotation:
    id: Id
    image_id: Id
    category_id: Id
    bbox: Annotated[list[Number], Field(strict=True, min_length=4, max_length=4)]
    area: Annotated[Number, Field(ge=0, le=1e10)] | None = None  # COCO's evaluators ignore objects of more than 1e10 pixels
    iscrowd: Literal[0, 1] | None = None


GROUPS = {"categories": TypeAdapter(_Category), "images": TypeAdapter(_Image), "annotations": TypeAdapter(_Annotation)}
KIND_OF_ERROR = {"missing": "missing-key", "finite_number": "non-finite"}  # pydantic's name: kind of finding


def read(path: Path) -> tuple[Annotations | None, Findings]:
    """Parse an annotation file; return None and the findings if it cannot be parsed. Never raises on bad content."""
    file, findings = str(path), Findings()
    try:
        with open(path, encoding="utf-8-sig") as stream:
            data = json.load(stream, object_pairs_hook=lambda pairs: _object(pairs, file, findings))
    except OSError as error:
        findings.append(Finding("annotations-missing", file, value=error.strerror or str(error)))
        return None, findings
    except (ValueError, RecursionError, MemoryError) as error:
        findings.append(Finding("annotations-not-json", file, value=_reason(error)))
        return None, findings
    return parse(data, file, findings), findings


def parse(data: Any, file: str, findings: Findings) -> Annotations | None:
    """Make the table of a COCO instances dictionary; note its faults in `findings`. None if a group is missing."""
    if faults := list(_structure_faults(data, file)):
        findings.extend(faults)
        return None
    categories, images, annotations = (_entries(data[group], group, file, findings) for group in GROUPS)
    by_category = _by_id(categories, file, findings, "duplicate-category-id", "name")
    by_image = _by_id(images, file, findings, "duplicate-image-id", "file_name")
    label = {key: n for n, key in enumerate(sorted(by_category), start=1)}
    position = {key: n for n, key in enumerate(by_image)}
    seen: set[int] = set()
    for row in annotations:
        if row.id in seen:
            findings.append(Finding("duplicate-annotation-id", file, row.image_id, row.id, "the id is used before"))
        if row.id == 0:
            findings.append(Finding("annotation-id-zero", file, row.image_id, row.id, "the id is 0"))
        if row.image_id not in position:
            findings.append(Finding("unknown-image", file, row.image_id, row.id, f"`image_id` is {row.image_id}"))
        if row.category_id not in label:
            findings.append(Finding("unknown-category", file, row.image_id, row.id, f"`category_id` is {row.category_id}"))
        seen.add(row.id)
    boxes = np.array([row.bbox for row in annotations], dtype=np.float64).reshape(-1, 4)
    areas = np.array([row.area for row in annotations], dtype=np.float64)  # None becomes NaN
    if np.isnan(areas).any():
        findings.append(Finding("area-missing", file, value=f"{np.isnan(areas).sum()} of {len(areas)} without `area`"))
    with np.errstate(over="ignore"):
        areas = np.where(np.isnan(areas), boxes[:, 2] * boxes[:, 3], areas)
    info = data.get("info")
    return Annotations(
        categories=[{"id": key, "name": by_category[key].name} for key in label],
        image_ids=np.array(list(by_image), dtype=np.int64),
        file_names=[image.file_name for image in by_image.values()],
        sizes=np.array([(image.height, image.width) for image in by_image.values()], dtype=np.int64).reshape(-1, 2),
        ids=np.array([row.id for row in annotations], dtype=np.int64),
        image_index=np.array([position.get(row.image_id, -1) for row in annotations], dtype=np.int64),
        labels=np.array([label.get(row.category_id, 0) for row in annotations], dtype=np.int64),
        boxes=boxes,
        areas=areas,
        crowd=np.array([row.iscrowd for row in annotations], dtype=bool),
        generated=isinstance(info, dict) and info.get("generated") is True,
    )


def _object(pairs: list[tuple[str, Any]], file: str, findings: Findings) -> dict[str, Any]:
    """Build an object of the file, without its mask. Python's json would silently use the last of equal keys."""
    entry = dict(pairs)
    if len(entry) != len(pairs):
        ((key, count),) = Counter(key for key, _ in pairs).most_common(1)
        findings.append(Finding("duplicate-key", file, value=f"{short_repr(key)} stands {count} times in {short_repr(entry)}"))
    # Polygons are most of a COCO file: free each one as soon as it is parsed.
    entry.pop("segmentation", None)
    return entry


def _reason(error: Exception) -> str:
    """Return why a file cannot be parsed, without json's quotation of its content."""
    if isinstance(error, MemoryError):
        return "too large for this machine's memory"
    return f"{error.reason} at byte {error.start}" if isinstance(error, UnicodeDecodeError) else str(error)


def _structure_faults(data: Any, file: str) -> Iterator[Finding]:
    if not isinstance(data, dict):
        yield Finding("structure", file, value=f"the top level is {short_repr(data)}, not an object")
        return
    for key in GROUPS:
        if not isinstance(data.get(key), list):
            yield Finding("structure", file, value=f"`{key}` is {short_repr(data[key]) if key in data else 'missing'}")
        elif not data[key] and key != "annotations":
            yield Finding("structure", file, value=f"`{key}` is empty")


def _entries(values: list[Any], group: str, file: str, findings: Findings) -> list[Any]:
    """Return the valid entries of a group; note each fault of the others.

    After Findings.LIMIT entries with faults the rest is skipped, which is noted too.
    """
    entries, bad = [], 0
    for n, value in enumerate(values, start=1):
        try:
            entries.append(GROUPS[group].validate_python(value))
        except ValidationError as error:
            findings.extend(_faults(value, error, group, file))
            bad += 1
        if bad == Findings.LIMIT:
            skipped = f"{len(values) - n:,} further entries of `{group}` were not looked at"
            findings.append(Finding("structure", file, value=skipped))
            break
    return entries


def _faults(entry: Any, error: ValidationError, group: str, file: str) -> Iterator[Finding]:
    """Name the faults of an entry, by its ids where they can be read."""
    keys = {"images": ("id", None), "annotations": ("image_id", "id")}.get(group, (None, None))
    ids = [entry.get(key) if isinstance(entry, dict) else None for key in keys]
    ids = [value if type(value) is int else None for value in ids]
    context = f" in {short_repr(entry)}" if ids == [None, None] else ""
    for fault in error.errors(include_url=False):
        key = "".join(f"[{part}]" if isinstance(part, int) else part for part in fault["loc"])
        value = f"`{key}` is {short_repr(fault['input'])}: {fault['msg']}"
        if fault["type"] == "missing":
            value = f"`{key}` is missing"
        if not key:
            value, context = f"an entry of `{group}` is {short_repr(entry)}, not an object", ""
        yield Finding(KIND_OF_ERROR.get(fault["type"], "wrong-type"), file, *ids, value + context)


def _by_id(entries: Sequence[Any], file: str, findings: Findings, kind: str, name: str) -> dict[int, Any]:
    """Index categories or images by their id; of those with one id, keep the first and note the others."""
    by_id: dict[int, Any] = {}
    for entry in entries:
        if (first := by_id.setdefault(entry.id, entry)) is not entry:
            names = f"id {entry.id}: {getattr(first, name)!a} and {getattr(entry, name)!a}"
            findings.append(Finding(kind, file, entry.id if isinstance(entry, _Image) else None, value=names))
    return by_id

"""Parse a COCO instances file into compact arrays, and note every fault of its structure.

N images, M annotations, K categories. The arrays of COCO's training set need a tenth of the memory of its dictionaries.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from fpn_ablate.data.checks.findings import Finding, Findings
from fpn_ablate.data.checks.segmentations import Flawed, MaskReader, far_from_boxes, to_mask
from fpn_ablate.utils import rle
from fpn_ablate.utils.errors import short_repr


@dataclass(frozen=True)
class Annotations:
    """The entries of a file whose values are valid, in the file's order."""

    categories: list[dict[str, Any]]  # K x {"id", "name"}, sorted by id: position k is label k + 1
    image_ids: np.ndarray  # (N,) int64
    file_names: list[str]  # N
    sizes: np.ndarray  # (N, 2) int64: height, width
    ids: np.ndarray  # (M,) int64, as in the file; 0 where beyond 2^53
    image_index: np.ndarray  # (M,) int64: position in image_ids; -1 where the image is unknown
    labels: np.ndarray  # (M,) int64, 1..K; 0 where the category is unknown
    boxes: np.ndarray  # (M, 4) float64: x, y, width, height as in the file
    areas: np.ndarray  # (M,) float64
    crowd: np.ndarray  # (M,) bool: `iscrowd` or `ignore`
    generated: bool = False  # the file says that its pictures are drawn by a program
    changes: dict[str, int] = field(default_factory=dict)  # what is read otherwise than it is written: number of entries
    masks: np.ndarray | None = None  # (M,) bytes (`utils.rle`), empty where no pixel can be used; None: masks are not read
    mask_flaws: np.ndarray | None = None  # (M,) kinds of findings, "" for a sound mask; None: masks are not read

    def select(self, rows: np.ndarray) -> "Annotations":
        """Keep these annotations (positions, or a mask), and all images."""
        columns = ["ids", "image_index", "labels", "boxes", "areas", "crowd"]
        columns += [] if self.masks is None else ["masks", "mask_flaws"]
        return replace(self, **{column: getattr(self, column)[rows] for column in columns})

    def used_images(self, keep_empty: bool) -> np.ndarray:
        """Return (N,) bool: the images that a run uses; without `keep_empty` those with an object that is no crowd region."""
        objects = np.bincount(self.image_index[~self.crowd], minlength=len(self.image_ids))
        return (objects > 0) | keep_empty


# Evaluators store ids as float64, which rounds integers beyond 2^53.
MAX_ID = 2**53
Id = Annotated[int, Field(strict=True, ge=-MAX_ID, le=MAX_ID)]
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
    id: Annotated[int, Field(strict=True)]
    image_id: Id
    category_id: Id
    bbox: Annotated[list[Number], Field(strict=True, min_length=4, max_length=4)]
    area: Annotated[Number, Field(ge=0, le=1e10)] | None = None  # COCO's evaluators ignore objects of more than 1e10 pixels
    iscrowd: Literal[0, 1] | None = None
    ignore: bool | None = None
    segmentation: Any = None


INTEGERS = ("id", "image_id", "category_id", "height", "width", "iscrowd")
GROUPS = {"categories": TypeAdapter(_Category), "images": TypeAdapter(_Image), "annotations": TypeAdapter(_Annotation)}
KIND_OF_ERROR = {"missing": "missing-key", "finite_number": "non-finite"}  # pydantic's name: kind of finding


def read(path: Path, masks: bool = False) -> tuple[Annotations | None, Findings]:
    """Parse an annotation file, with its `masks` on request; return None and the findings if it cannot be parsed.

    Never raises on bad content.
    """
    if not masks:
        return _read(path, False, lambda entry: entry.pop("segmentation", None))
    reader = MaskReader()
    table, findings = _read(path, True, reader)
    if table and not reader.knew(table.image_ids, table.sizes):  # another list of the file looks like its images
        return _read(path, True, lambda entry: None)
    return table, findings


def _read(path: Path, masks: bool, free: Callable[[dict[str, Any]], object]) -> tuple[Annotations | None, Findings]:
    """Read a file as `read` does; `free` shrinks each object as soon as it is parsed, since polygons are most of a file."""
    file, findings = str(path), Findings()
    try:
        with open(path, encoding="utf-8-sig") as stream:
            data = json.load(stream, object_pairs_hook=lambda pairs: _object(pairs, file, findings, free))
    except OSError as error:
        findings.append(Finding("annotations-missing", file, value=error.strerror or str(error)))
        return None, findings
    except (ValueError, RecursionError, MemoryError) as error:
        findings.append(Finding("annotations-not-json", file, value=_reason(error)))
        return None, findings
    return parse(data, file, findings, masks), findings


def parse(data: Any, file: str, findings: Findings, masks: bool = False) -> Annotations | None:
    """Make the table of a COCO instances dictionary; note its faults in `findings`. None if a group is missing."""
    if faults := list(_structure_faults(data, file)):
        findings.extend(faults)
        return None
    mended: Counter[str] = Counter()
    read = [_entries(data[group], group, file, findings, mended) for group in GROUPS]
    (categories, faulty_categories), (images, faulty_images), (annotations, _) = read
    by_category = _by_id(categories, file, findings, "duplicate-category-id", "name", mended)
    by_image = _by_id(images, file, findings, "duplicate-image-id", "file_name", mended)
    label = {key: n for n, key in enumerate(sorted(by_category), start=1)}
    position = {key: n for n, key in enumerate(by_image)}
    for row in annotations:
        if row.image_id not in position and not faulty_images & {row.image_id, None}:
            findings.append(Finding("unknown-image", file, row.image_id, row.id, f"`image_id` is {row.image_id}"))
        if row.category_id not in label and not faulty_categories & {row.category_id, None}:
            findings.append(Finding("unknown-category", file, row.image_id, row.id, f"`category_id` is {row.category_id}"))
    ids = [row.id if abs(row.id) <= MAX_ID else 0 for row in annotations]
    if renumbered := len(ids) - len({*ids} - {0}):
        mended["annotation ids that are 0, repeated or beyond 2^53, numbered anew"] = renumbered
    mended = +mended  # without zeros
    findings.extend(Finding("mended", file, value=f"{count} {what}") for what, count in mended.items())
    changes = dict(mended)
    if ignored := sum(bool(row.ignore and not row.iscrowd) for row in annotations):
        findings.append(Finding("ignore-flag", file, value=f"{ignored} of {len(annotations)} annotations have `ignore` = 1"))
        changes["annotations with ignore=1 treated like crowd regions"] = ignored
    boxes = np.array([row.bbox for row in annotations], dtype=np.float64).reshape(-1, 4)
    sizes = np.array([(image.height, image.width) for image in by_image.values()], dtype=np.int64).reshape(-1, 2)
    image_index = np.array([position.get(row.image_id, -1) for row in annotations], dtype=np.int64)
    counts, flaws = _masks(annotations, sizes, image_index, boxes, file, findings) if masks else (None, None)
    areas = _areas(annotations, boxes, counts, sizes[image_index] if len(sizes) else sizes, file, findings, changes)
    info = data.get("info")
    return Annotations(
        categories=[{"id": key, "name": by_category[key].name} for key in label],
        image_ids=np.array(list(by_image), dtype=np.int64),
        file_names=[image.file_name for image in by_image.values()],
        sizes=sizes,
        ids=np.array(ids, dtype=np.int64),
        image_index=image_index,
        labels=np.array([label.get(row.category_id, 0) for row in annotations], dtype=np.int64),
        boxes=boxes,
        areas=areas,
        crowd=np.array([row.iscrowd or row.ignore for row in annotations], dtype=bool),
        generated=isinstance(info, dict) and info.get("generated") is True,
        changes=changes,
        masks=counts,
        mask_flaws=flaws,
    )


def _masks(
    annotations: Sequence[_Annotation],
    sizes: np.ndarray,
    image_index: np.ndarray,
    boxes: np.ndarray,
    file: str,
    findings: Findings,
) -> tuple[np.ndarray, np.ndarray]:
    """Return masks and flaws (M,) of annotations, and free what was parsed. Those of unknown images have neither."""
    counts, flaws = np.full(len(annotations), b"", object), np.full(len(annotations), "", object)
    faults = []
    for m, (row, n) in enumerate(zip(annotations, image_index.tolist(), strict=True)):
        mask, row.segmentation = row.segmentation, None
        if n >= 0 and not isinstance(mask, bytes | Flawed):  # its image stands behind it in the file
            mask = to_mask(mask, tuple(sizes[n].tolist()))
        if isinstance(mask, bytes):
            counts[m] = mask
        elif isinstance(mask, Flawed):
            counts[m], flaws[m] = mask.counts, mask.kind
            faults.append(Finding(mask.kind, file, row.image_id, row.id, mask.value))
    if len(annotations) and (flaws == "mask-missing").all():
        value = f"none of {len(annotations)} annotations has a `segmentation`"
        faults = [Finding("masks-missing", file, value=value)]
    findings.extend(faults)
    far = np.flatnonzero(far_from_boxes(counts, sizes[image_index], boxes)) if len(sizes) else ()
    if len(far):
        first, box = annotations[far[0]], boxes[far[0]].tolist()
        value = f"{len(far)} of {len(annotations)} masks lie elsewhere than `bbox`, the first beside {box}"
        findings.append(Finding("mask-unlike-box", file, first.image_id, first.id, value))
    return counts, flaws


def _areas(
    annotations: Sequence[_Annotation],
    boxes: np.ndarray,
    masks: np.ndarray | None,
    sizes: np.ndarray,
    file: str,
    findings: Findings,
    changes: dict[str, int],
) -> np.ndarray:
    """Return the areas (M,); in place of what is missing or cannot be right those of the masks in images of `sizes` (M, 2), or
    width x height of the box where there is none."""
    areas = np.array([row.area for row in annotations], dtype=np.float64)  # None becomes NaN
    if np.isnan(areas).any():
        findings.append(Finding("area-missing", file, value=f"{np.isnan(areas).sum()} of {len(areas)} without `area`"))
    if count := int((unlike := unlike_boxes(areas, boxes)).sum()):
        first = int(unlike.argmax())
        example = f"as {areas[first]:g} in a box of {boxes[first, 2]:g} x {boxes[first, 3]:g}"
        findings.append(Finding("area-unlike-box", file, value=f"{count} of {len(areas)} `area` cannot be right, {example}"))
        changes[f"areas that cannot be right replaced by {'width x height' if masks is None else 'those of masks'}"] = count
    with np.errstate(over="ignore"):
        made = boxes[:, 2] * boxes[:, 3]
    wrong = np.isnan(areas) | unlike
    if masks is not None:
        drawn = np.flatnonzero(wrong & masks.astype(bool))
        made[drawn] = rle.areas_of(masks[drawn], sizes[drawn])
    return np.where(wrong, made, areas)


def unlike_boxes(areas: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return (M,) bool: the areas in pixels that their boxes rule out; none of NaN.

    Such are 0, and more than a box with inclusive corners holds. If all are constant, or tiny beside their boxes (a fraction of
    the image, another unit), all are ruled out.
    """
    width, height = boxes[:, 2:].clip(min=0).T
    with np.errstate(over="ignore"):
        full, most = width * height, (width + 1) * (height + 1)
    declared = ~np.isnan(areas) & (full > 0)
    telling = declared & (full > 4)  # in smaller boxes any area is possible
    if (boxes <= 1.05).all() or not telling.any():  # fractions of the image: another fault
        return np.zeros(len(areas), dtype=bool)
    tiny = (areas <= 1) | (areas < full / 200)
    box_areas, values = full[telling], areas[telling]
    constant = len(values) > 2 and values.min() == values.max() and box_areas.max() > 4 * box_areas.min()
    if constant or tiny[telling].all():
        return declared
    return telling & (areas == 0) | declared & (areas > most)


def _object(
    pairs: list[tuple[str, Any]], file: str, findings: Findings, free: Callable[[dict[str, Any]], object]
) -> dict[str, Any]:
    """Build an object of the file, and shrink it. Python's json would silently use the last of equal keys."""
    entry = dict(pairs)
    if len(entry) != len(pairs):
        ((key, count),) = Counter(key for key, _ in pairs).most_common(1)
        findings.append(Finding("duplicate-key", file, value=f"{short_repr(key)} stands {count} times in {short_repr(entry)}"))
    free(entry)
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


def _entries(
    values: list[Any], group: str, file: str, findings: Findings, mended: Counter[str]
) -> tuple[list[Any], set[int | None]]:
    """Return the valid entries of a group, and the ids of the others: None where an id cannot be read. Note their faults.

    After Findings.LIMIT entries with faults the rest is skipped, which is noted too.
    """
    entries, faulty = [], set[int | None]()
    bad = 0
    for n, value in enumerate(values, start=1):
        try:
            entries.append(_validated(value, group, mended))
        except ValidationError as error:
            findings.extend(_faults(value, error, group, file))
            key = value.get("id") if isinstance(value, dict) else None
            faulty.add(int(key) if isinstance(key, int | float) and key == key // 1 else None)
            bad += 1
        if bad == Findings.LIMIT:
            skipped = f"{len(values) - n:,} further entries of `{group}` were not looked at"
            findings.append(Finding("structure", file, value=skipped))
            faulty.add(None)
            break
    return entries, faulty


def _validated(value: Any, group: str, mended: Counter[str]) -> Any:
    """Return an entry with valid values; take 1.0 (pandas) and "1" (VIA, pylabel) for 1, and LVIS's addresses for names."""
    try:
        return GROUPS[group].validate_python(value)
    except ValidationError:
        entry = value if isinstance(value, dict) else {}
        whole = {key: int(v) for key, v in entry.items() if key in INTEGERS and _is_whole(v)}
        name = _lvis_name(entry) if group == "images" else {}
        if not whole and not name:
            raise
        valid = GROUPS[group].validate_python(entry | whole | name)
        mended[f"entries of `{group}` with whole numbers written as floats or text"] += bool(whole)
        mended["entries of `images` without `file_name`, read from the last two parts of `coco_url`"] += bool(name)
        return valid


def _lvis_name(image: dict[str, Any]) -> dict[str, str]:
    """Return the `file_name` that an image of LVIS lacks: train2017/000000000009.jpg of its address."""
    url = image.get("coco_url")
    return {"file_name": "/".join(url.split("/")[-2:])} if "file_name" not in image and isinstance(url, str) else {}


def _is_whole(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) < 20 and value.isascii() and value.isdigit() and str(int(value)) == value
    return isinstance(value, float) and value.is_integer()


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


def _by_id(entries: Sequence[Any], file: str, findings: Findings, kind: str, name: str, mended: Counter[str]) -> dict[int, Any]:
    """Index categories or images by their id; of those with one id, keep the first and note the others that differ."""
    by_id: dict[int, Any] = {}
    for entry in entries:
        if (first := by_id.setdefault(entry.id, entry)) is entry:
            continue
        if first == entry:
            mended["entries of `images` or `categories` that repeat an equal one, left out"] += 1
            continue
        names = f"id {entry.id}: {getattr(first, name)!a} and {getattr(entry, name)!a}"
        findings.append(Finding(kind, file, entry.id if isinstance(entry, _Image) else None, value=names))
    return by_id

"""Parse a COCO instances file into compact arrays, and note every fault of its structure.

N images, M annotations, K categories. The arrays of COCO's training set need a tenth of the memory of its dictionaries.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fpn_ablate.data.checks.findings import Finding, Findings
from fpn_ablate.utils.errors import short_repr

LARGEST_AREA = 1e10  # square pixels; COCO's evaluators ignore larger objects


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
    if faults := list(_check_structure(data, file)):
        findings.extend(faults)
        return None, findings
    categories = _categories(_rows(data, "categories", file, findings), file, findings)
    images = _images(_rows(data, "images", file, findings), file, findings)
    table = _annotations(_rows(data, "annotations", file, findings), categories, images, file, findings)
    info = data.get("info")
    return replace(table, generated=isinstance(info, dict) and info.get("generated") is True), findings


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


def _check_structure(data: Any, file: str) -> Iterator[Finding]:
    if not isinstance(data, dict):
        yield Finding("structure", file, value=f"the top level is {short_repr(data)}, not an object")
        return
    for key in FIELDS:
        if not isinstance(data.get(key), list):
            yield Finding("structure", file, value=f"`{key}` is {short_repr(data[key]) if key in data else 'missing'}")
        elif not data[key] and key != "annotations":
            yield Finding("structure", file, value=f"`{key}` is empty")


class _Bad(Exception):
    """An invalid value; the arguments are the kind of finding and its text."""


def _get(entry: dict[str, Any], key: str) -> Any:
    if key not in entry:
        raise _Bad("missing-key", f"`{key}` is missing")
    return entry[key]


def _integer(entry: dict[str, Any], key: str) -> int:
    value = _get(entry, key)
    if type(value) is not int:
        raise _Bad("wrong-type", f"`{key}` is {short_repr(value)}, not an integer")
    if abs(value) > 2**53:  # evaluators store ids as float64, which rounds larger integers
        raise _Bad("wrong-type", f"`{key}` is {short_repr(value)}; COCO's evaluators cannot distinguish integers beyond 2^53")
    return value


def _extent(entry: dict[str, Any], key: str) -> int:
    value = _integer(entry, key)
    if value < 1:
        raise _Bad("wrong-type", f"`{key}` is {value}, not a positive integer")
    return value


def _text(entry: dict[str, Any], key: str) -> str:
    value = _get(entry, key)
    if type(value) is not str or not value:
        raise _Bad("wrong-type", f"`{key}` is {short_repr(value)}, not a non-empty string")
    if any("\ud800" <= char <= "\udfff" for char in value):  # possible in JSON, but in no file name
        raise _Bad("wrong-type", f"`{key}` is {short_repr(value)}, which has half of a surrogate pair")
    return value


def _number(value: Any, key: str) -> float:
    if type(value) is not float and type(value) is not int:
        raise _Bad("wrong-type", f"`{key}` holds {short_repr(value)}, not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _Bad("non-finite", f"`{key}` holds {short_repr(value)}")
    return number


def _box(entry: dict[str, Any], key: str) -> list[float]:
    value = _get(entry, key)
    if type(value) is not list or len(value) != 4:
        raise _Bad("wrong-type", f"`{key}` is {short_repr(value)}, not [x, y, width, height]")
    return [_number(side, key) for side in value]


def _area(entry: dict[str, Any], key: str) -> float:
    value = entry.get(key)
    area = math.nan if value is None else _number(value, key)
    if area < 0:
        raise _Bad("wrong-type", f"`{key}` is {short_repr(value)}, not a number of at least 0")
    if area > LARGEST_AREA:
        raise _Bad("wrong-type", f"`{key}` is {short_repr(value)}; above {LARGEST_AREA:g}, COCO's evaluators count no object")
    return area


def _flag(entry: dict[str, Any], key: str) -> bool:
    value = entry.get(key)
    if value not in (0, 1, None):
        raise _Bad("wrong-type", f"`{key}` is {short_repr(value)}, not 0 or 1")
    return bool(value)


FIELDS: dict[str, dict[str, Callable[[dict[str, Any], str], Any]]] = {
    "categories": {"id": _integer, "name": _text},
    "images": {"id": _integer, "file_name": _text, "height": _extent, "width": _extent},
    "annotations": {
        "id": _integer,
        "image_id": _integer,
        "category_id": _integer,
        "bbox": _box,
        "area": _area,
        "iscrowd": _flag,
    },
}


def _rows(data: dict[str, Any], group: str, file: str, findings: Findings) -> list[list[Any]]:
    """Return the values of each valid entry of a group, in the order of FIELDS; note each fault of the others.

    After Findings.LIMIT entries with faults the rest is skipped, which is noted too.
    """
    fields, rows, bad = list(FIELDS[group].items()), [], 0
    for n, entry in enumerate(data[group]):
        try:
            rows.append([check(entry, key) for key, check in fields])
        except (_Bad, AttributeError, TypeError):  # the latter two where the entry is no dictionary
            findings.extend(_faults(entry, group, file))
            bad += 1
        if bad == Findings.LIMIT:
            skipped = len(data[group]) - n - 1
            findings.append(Finding("structure", file, value=f"{skipped:,} further entries of `{group}` were not looked at"))
            break
    return rows


def _faults(entry: Any, group: str, file: str) -> Iterator[Finding]:
    if not isinstance(entry, dict):
        yield Finding("wrong-type", file, value=f"an entry of `{group}` is {short_repr(entry)}, not an object")
        return
    ids = {key: value for key, value in entry.items() if key in ("id", "image_id") and type(value) is int}
    image_id = ids.get({"images": "id", "annotations": "image_id"}.get(group, ""))
    annotation_id = ids.get("id") if group == "annotations" else None
    where = f" in {short_repr(entry)}" if image_id is None and annotation_id is None else ""
    for key, check in FIELDS[group].items():
        try:
            check(entry, key)
        except _Bad as bad:
            yield Finding(bad.args[0], file, image_id, annotation_id, bad.args[1] + where)


def _categories(rows: list[list[Any]], file: str, findings: Findings) -> list[dict[str, Any]]:
    names: dict[int, str] = {}
    for key, name in rows:
        if key in names:
            findings.append(Finding("duplicate-category-id", file, value=f"category id {key}: {names[key]!a} and {name!a}"))
        names.setdefault(key, name)
    return [{"id": key, "name": names[key]} for key in sorted(names)]


def _images(rows: list[list[Any]], file: str, findings: Findings) -> dict[int, list[Any]]:
    images: dict[int, list[Any]] = {}
    for row in rows:
        if row[0] in images:
            findings.append(Finding("duplicate-image-id", file, row[0], value=f"{images[row[0]][1]!a} and {row[1]!a}"))
        images.setdefault(row[0], row)
    return images


def _annotations(
    rows: list[list[Any]],
    categories: list[dict[str, Any]],
    images: dict[int, list[Any]],
    file: str,
    findings: Findings,
) -> Annotations:
    position = {key: n for n, key in enumerate(images)}
    label = {category["id"]: n for n, category in enumerate(categories, start=1)}
    seen: set[int] = set()
    for key, image, category, *_ in rows:
        if key in seen:
            findings.append(Finding("duplicate-annotation-id", file, image, key, "the id is used before"))
        if key == 0:
            findings.append(Finding("annotation-id-zero", file, image, key, "the id is 0"))
        if image not in position:
            findings.append(Finding("unknown-image", file, image, key, f"`image_id` is {image}"))
        if category not in label:
            findings.append(Finding("unknown-category", file, image, key, f"`category_id` is {category}"))
        seen.add(key)
    boxes = np.array([row[3] for row in rows], dtype=np.float64).reshape(-1, 4)
    areas = np.array([row[4] for row in rows], dtype=np.float64)
    if np.isnan(areas).any():
        findings.append(Finding("area-missing", file, value=f"{np.isnan(areas).sum()} of {len(areas)} without `area`"))
    with np.errstate(over="ignore"):
        areas = np.where(np.isnan(areas), boxes[:, 2] * boxes[:, 3], areas)
    return Annotations(
        categories,
        np.array(list(images), dtype=np.int64),
        [image[1] for image in images.values()],
        np.array([image[2:] for image in images.values()], dtype=np.int64).reshape(-1, 2),
        np.array([row[0] for row in rows], dtype=np.int64),
        np.array([position.get(row[1], -1) for row in rows], dtype=np.int64),
        np.array([label.get(row[2], 0) for row in rows], dtype=np.int64),
        boxes,
        areas,
        np.array([row[5] for row in rows], dtype=bool),
    )

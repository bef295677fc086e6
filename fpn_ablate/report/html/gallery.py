"""Pictures of the page: rows compared image by image, the levels of their pyramids, and sample images of the data.

All are read from the files that runs leave on the disk (fpn_ablate.runs.artifacts). A missing or damaged file is named in one
line, and the page goes without it. R rows, N images.
"""

import base64
import io
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fpn_ablate.evaluation.display import MATCHED_PROPOSALS, MAX_PROPOSALS, MIN_SCORE, closest
from fpn_ablate.report.collate.table import Row, Table
from fpn_ablate.utils import rle
from fpn_ablate.utils.files import UNREADABLE, open_arrays, safe_name
from fpn_ablate.utils.outlines import outlines, svg_path
from fpn_ablate.utils.paths import ARTIFACTS, DETECTIONS, INSPECTED, PICTURES, TRUE_MASKS, TRUTH

# Images with the greatest spread over the rows, images evenly spaced over the data, images of the contact sheet.
SPREAD, EVEN, SHEET = 16, 8, 12
MAX_BYTES = 2_400_000  # of pictures, boxes, masks and levels on one page, as text


@dataclass
class Album:
    """The pictures of one page, each embedded once, from all data sets of its tables.

    Attributes:
        sets: {name of a set of pictures: (its folder, its ground truth)}.
        masks: {name: {image: masks of its objects}}, of sets on which a run has masks.
        pictures: {key: picture as the page's script takes it}.
        spent: bytes used of MAX_BYTES.
        full: True once something was left out for its size.
    """

    sets: dict[str, tuple[Path, dict[str, Any]]] = field(default_factory=dict)
    masks: dict[str, dict[str, list[bytes]]] = field(default_factory=dict)
    pictures: dict[str, dict[str, Any]] = field(default_factory=dict)
    spent: int = 0
    full: bool = False

    def reserve(self, size: int) -> bool:
        """Reserve `size` bytes of the page and return True, or return False if the page is full."""
        fits = self.spent + size <= MAX_BYTES
        self.spent, self.full = self.spent + size * fits, self.full or not fits
        return fits

    def add(self, name: str, image: str) -> str | None:
        """Embed a picture and return its key, or None if it cannot be read or the page is full."""
        key = f"{name}/{image}"
        if key not in self.pictures:
            try:
                folder, truth = self.sets[name]
                picture = _picture(folder, image, truth["images"][image])
            except Exception:  # Pillow's decoders raise errors of many kinds
                return None
            if not self.reserve(len(picture["src"]) + 400):
                return None
            self.pictures[key] = picture
        self._add_masks(name, image, self.pictures[key])
        return key

    def _add_masks(self, name: str, image: str, picture: dict[str, Any]) -> None:
        masks = self.masks.get(name, {}).get(image, [])
        if "masks" not in picture and len(masks) == len(picture["truth"]):
            paths = [_path(mask, _size(picture)) for mask in masks]
            if self.reserve(sum(map(len, paths)) + 20):
                picture["masks"] = paths


@dataclass(frozen=True)
class RunArtifacts:
    """Artifacts of one run: the metric (`values`), boxes and masks of each image, and what `runs.pyramid` has of the levels.

    Boxes are best first, each with its score in percent; masks are of these boxes, and None without masks.

    Attributes:
        levels, added: of each mapped image {level: (h, w) uint8}.
        mapped: ids of these images; older runs have one map, of the first image, without its id.
        found: {image: [[x0, y0, x1, y1, level or -1]]}, boxes in shares of width and height.
    """

    row: Row
    values: dict[str, float]
    boxes: dict[str, list[list[int]]]
    masks: dict[str, list[bytes]] | None
    levels: list[dict[str, np.ndarray]]
    added: list[dict[str, np.ndarray]]
    mapped: list[str]
    found: dict[str, list[list[float]]]
    detections: bool


@dataclass(frozen=True)
class TableArtifacts:
    """Artifacts of a table's runs at one seed. `missing` has a line for everything that is missing, with the reason."""

    seed: int | None
    pictures: str
    runs: tuple[RunArtifacts, ...]
    missing: tuple[str, ...]


def load_artifacts(table: Table, album: Album) -> TableArtifacts:
    """Load the artifacts of the seed that most rows have; of several such seeds, the smallest."""
    rows = [row for row in table.finished_rows if row.folders]
    counts = Counter(seed for row in rows for seed in row.seeds if (_folder(row, seed) / ARTIFACTS).is_file())
    if not counts:
        absent = "no artifacts.npz is on this disk. python -m fpn_ablate artifacts RUNS makes it."
        elsewhere = "no folder of its runs is on this disk." if table.finished_rows else "no run is finished."
        return TableArtifacts(None, "", (), (f"Pictures: {absent if rows else elsewhere}",))
    seed = min(counts, key=lambda seed: (-counts[seed], seed))
    loaded, missing = [], []
    for row in table.finished_rows:
        try:
            folder = _folder(row, seed)
            artifacts = _load_run(row, folder)
            name = str(next(record["pictures"] for record in row.records if record["seed"] == seed))
            if name not in album.sets:
                pictures = folder.resolve().parents[3] / PICTURES / safe_name(name)
                album.sets[name] = pictures, _truth(pictures)
            if artifacts.masks is not None and name not in album.masks:
                album.masks[name] = _true_masks(album.sets[name][0])
            loaded.append((name, artifacts))
        except (*UNREADABLE, StopIteration) as error:
            why = f"no file {Path(error.filename).name}" if isinstance(error, FileNotFoundError) else "damaged or incomplete"
            missing.append(f"{row.name}, seed {seed}: {why}")
    name = Counter(name for name, _ in loaded).most_common(1)[0][0] if loaded else ""
    missing += [f"{run.row.name}, seed {seed}: evaluated on other pictures" for other, run in loaded if other != name]
    if name and not album.sets[name][1]["images"]:
        missing.append(f"the pictures: {name}/{TRUTH} is missing or damaged")
    if any(run.masks is not None for _, run in loaded) and not album.masks.get(name):
        missing.append(f"masks of the ground truth: {name}/{TRUE_MASKS} is missing or damaged")
    return TableArtifacts(seed, name, tuple(run for other, run in loaded if other == name), tuple(missing))


def gallery(artifacts: TableArtifacts, album: Album, colours: dict[str, int]) -> dict[str, Any] | None:
    """Build the data of the comparison that the page's script draws; None if fewer than two rows can be compared."""
    if len(artifacts.runs) < 2:
        return None
    _, truth = album.sets[artifacts.pictures]
    chosen = choose([run.values for run in artifacts.runs], list(truth["images"]))
    keys = {image: key for image in chosen if (key := album.add(artifacts.pictures, image))}
    if not keys:
        return None
    rows = [
        {
            "row": run.row.row,
            "label": run.row.name,
            "colour": colours[run.row.row],
            "values": [round(100 * run.values[image], 1) for image in keys],
            **_drawn(run, {image: album.pictures[key] for image, key in keys.items()}, album.masks.get(artifacts.pictures, {})),
        }
        for run in artifacts.runs
    ]
    detections = any(run.detections for run in artifacts.runs)
    masks = any(run.masks is not None for run in artifacts.runs)
    if detections:
        shown = f"Boxes{' and masks' * masks}: detections of score ≥ {MIN_SCORE:g}"
    elif masks:
        shown = f"Masks: of the {MATCHED_PROPOSALS} best proposals those that match an object best"
    else:
        shown = f"Boxes: the best {MAX_PROPOSALS} proposals"
    content = {"metric": "AP" if detections else "AR@100", "shown": shown, "images": list(keys.values()), "rows": rows}
    return content if album.reserve(len(json.dumps(content, separators=(",", ":")))) else None


def _drawn(run: RunArtifacts, pictures: dict[str, dict[str, Any]], objects: dict[str, list[bytes]]) -> dict[str, Any]:
    """Return the boxes that the page draws on each picture and, if the run has masks, these as (SVG path, score in percent).

    Of segment proposals the masks alone are drawn, those that match an object best.
    """
    boxes = [run.boxes.get(image, []) for image in pictures]
    if run.masks is None:
        return {"boxes": boxes}
    masks = []
    for (image, picture), drawn in zip(pictures.items(), boxes, strict=True):
        counts, selected = run.masks.get(image, []), range(len(drawn))
        if not run.detections:
            real = [mask for mask, item in zip(objects.get(image, []), picture["truth"], strict=False) if not item[-1]]
            try:
                selected = closest(real, counts, _size(picture))
            except UNREADABLE:
                selected = []
        masks.append([[_path(counts[k], _size(picture)), drawn[k][-1]] for k in selected])
    return {"boxes": boxes if run.detections else [[] for _ in boxes], "masks": masks}


def choose(values: list[dict[str, float]], images: list[str]) -> list[str]:
    """Choose the images with the greatest spread over the rows, some evenly spaced, and one win of each row over each other.

    Args:
        values: R rows, {image: metric}, NaN or absent if undefined. images: the images that have a picture.
    """
    table = np.array([[row.get(image, np.nan) for image in images] for row in values], dtype=float)
    complete = np.flatnonzero(np.isfinite(table).all(axis=0))
    if not len(complete):
        return []
    table = table[:, complete]
    spread = table.max(axis=0) - table.min(axis=0)
    chosen = [int(i) for i in np.argsort(-spread, kind="stable")[:SPREAD]]
    chosen += [int(i) for i in np.linspace(0, len(complete) - 1, min(EVEN, len(complete))).round()]
    for first in table:
        for second in table:
            won = first - second
            if won.max() > 0 and not (won[chosen] > 0).any():
                chosen.append(int(won.argmax()))
    return [images[complete[i]] for i in dict.fromkeys(chosen)]


def pyramid(artifacts: TableArtifacts, album: Album, colours: dict[str, int]) -> dict[str, Any] | None:
    """Build the data of the pyramids that the page's script draws; None without any map.

    Of each image its picture's key and, for each row, its levels: (name, caption, map, map of what the top-down path adds or
    None), and its objects by level. Maps are grey PNGs as data URLs.
    """
    first = next(iter(album.sets[artifacts.pictures][1]["images"]), "") if artifacts.runs else ""
    ids = list(dict.fromkeys(image for run in artifacts.runs for image in run.mapped or [first] if run.levels))
    images = []
    for image in ids:
        rows = []
        for run in artifacts.runs:
            place = (run.mapped or [first]).index(image) if image in (run.mapped or [first]) else len(run.levels)
            if place < len(run.levels):
                levels = [_level(*level, run.added[place].get(level[0])) for level in run.levels[place].items()]
                texts = {"row": run.row.row, "label": run.row.name, "colour": colours[run.row.row]}
                rows.append(texts | {"levels": levels, "found": run.found.get(image)})
        entry = {"image": image, "rows": rows}
        if rows and album.reserve(len(json.dumps(entry))):
            images.append(entry | {"picture": album.add(artifacts.pictures, image)})
    return {"images": images} if images else None


def sheets(album: Album) -> list[dict[str, Any]]:
    """Choose up to SHEET evenly spaced pictures of each data set."""
    contact_sheets = []
    for name, (_, truth) in album.sets.items():
        images = list(truth["images"])
        places = sorted({round(i) for i in np.linspace(0, len(images) - 1, min(SHEET, len(images)))})
        keys = [key for place in places if (key := album.add(name, images[place]))]
        if keys:
            contact_sheets.append(
                {"name": name, "categories": truth["categories"], "pictures": keys, "masks": bool(album.masks.get(name))}
            )
    return contact_sheets


def _folder(row: Row, seed: int) -> Path:
    return row.folders.get(seed, Path("/nonexistent"))


def _load_run(row: Row, folder: Path) -> RunArtifacts:
    with open_arrays(folder / ARTIFACTS) as content:
        values = {str(i): float(v) for i, v in zip(content["image_ids"], content["values"], strict=True)}
        arrays = {name: content[name] for name in content.files if name.startswith(INSPECTED)}
    with open_arrays(folder / DETECTIONS) as content:
        ids, boxes, scores = content["image_ids"], content["boxes"].reshape(-1, 4), content["scores"]
        detections = "labels" in content.files
        joined, lengths = (content[name] if name in content.files else None for name in ("masks", "mask_lengths"))
    ends, limit = (None, MAX_PROPOSALS) if lengths is None else (np.cumsum(lengths), MATCHED_PROPOSALS)
    by_image: dict[str, list[list[int]]] = {}
    masks: dict[str, list[bytes]] = {}
    for k in np.argsort(-scores, kind="stable"):
        drawn = by_image.setdefault(str(ids[k]), [])
        if scores[k] >= MIN_SCORE if detections else len(drawn) < limit:
            drawn.append([*(int(side) for side in boxes[k].round()), round(100 * float(scores[k]))])
            if ends is not None:
                masks.setdefault(str(ids[k]), []).append(joined[ends[k] - lengths[k] : ends[k]].tobytes())
    return RunArtifacts(row, values, by_image, None if ends is None else masks, *_inspected(arrays), detections)


def _inspected(
    arrays: dict[str, np.ndarray],
) -> tuple[list[dict[str, np.ndarray]], list[dict[str, np.ndarray]], list[str], dict[str, list[list[float]]]]:
    """Return the levels, what is added to them, the mapped images and the found objects of `RunArtifacts`."""
    mapped = [str(int(image)) for image in arrays.get("mapped_ids", [])]
    kinds: dict[str, list[dict[str, np.ndarray]]] = {"level": [], "added": []}
    for kind, images in kinds.items():
        for n in range(max(len(mapped), 1)):
            ends = {name: re.fullmatch(rf"{kind}_(\w+){re.escape(f'.{n}') if n else ''}", name) for name in arrays}
            images.append({match[1]: level for name, match in ends.items() if match and _is_map(level := arrays[name])})
    levels = kinds["level"] if any(kinds["level"]) else []
    found: dict[str, list[list[float]]] = {}
    columns = [arrays.get(f"found_{key}") for key in ("ids", "boxes", "levels")]
    if all(column is not None and np.isfinite(column).all() for column in columns):
        for image, box, level in zip(*(column.tolist() for column in columns), strict=True):
            found.setdefault(str(int(image)), []).append([*(round(float(side), 4) for side in box), int(level)])
    return levels, kinds["added"], mapped, found


def _is_map(level: np.ndarray) -> bool:
    return level.ndim == 2 and level.dtype == np.uint8 and level.size > 0


def _truth(folder: Path) -> dict[str, Any]:
    """Read the classes of a set of pictures and the objects of each; without images if they cannot be read."""
    try:
        content = json.loads((folder / TRUTH).read_text(encoding="utf-8"))
        images = {key: image for key, image in content["images"].items() if image["width"] > 0 and image["height"] > 0}
        return {"categories": [str(name) for name in content["categories"]], "images": images}
    except UNREADABLE:
        return {"categories": [], "images": {}}


def _true_masks(folder: Path) -> dict[str, list[bytes]]:
    """Read the masks of the objects of a set of pictures; none if they cannot be read."""
    try:
        content = json.loads((folder / TRUE_MASKS).read_text(encoding="utf-8"))
        return {image: [mask.encode("ascii") for mask in masks] for image, masks in content.items()}
    except UNREADABLE:
        return {}


def _picture(folder: Path, image: str, truth: dict[str, Any]) -> dict[str, Any]:
    from PIL import Image

    file = (folder / f"{image}.jpg").resolve()
    if file.parent != folder.resolve():  # of a link or a name that leads elsewhere: the page would embed that file
        raise ValueError(f"{image} is outside {folder}")
    buffer = io.BytesIO()
    with Image.open(file, formats=("JPEG",)) as picture:
        picture.convert("RGB").save(buffer, "WEBP", quality=72, method=2)
    names = Counter(str(item["category"]) for item in truth["objects"])
    alt = ", ".join(f"{count} {name}" for name, count in names.most_common()) or "no object"
    objects = [[*(round(float(side)) for side in item["bbox"]), str(item["category"]), bool(item.get("crowd"))]
               for item in truth["objects"]]  # fmt: skip
    size = {"width": int(truth["width"]), "height": int(truth["height"])}
    return {"src": _data_url("webp", buffer), **size, "truth": objects, "alt": f"image {file.stem}: {alt}"}


def _size(picture: dict[str, Any]) -> rle.Size:
    return picture["height"], picture["width"]


def _path(mask: bytes, size: rle.Size) -> str:
    """Return a mask's outline as an SVG path, exact to the pixels that the page shows; empty if the mask is damaged."""
    try:
        return svg_path(outlines(mask, size, max(0.7, max(size) / 400)))
    except UNREADABLE:
        return ""


def _level(name: str, level: np.ndarray, added: np.ndarray | None) -> tuple[str, str, str, str | None]:
    number = re.search(r"\d+", name)
    stride = f"stride {2 ** int(number[0])}, " if number and int(number[0]) < 12 else ""
    caption = f"{stride}{level.shape[1]} × {level.shape[0]}"
    return name.upper(), caption, _grey(level), None if added is None or added.shape != level.shape else _grey(added)


def _grey(level: np.ndarray) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(level).save(buffer, "PNG", optimize=True)
    return _data_url("png", buffer)


def _data_url(kind: str, buffer: io.BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"

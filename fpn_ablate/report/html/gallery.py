"""Pictures for the page: rows compared image by image, the levels of their pyramids, and what the data look like.

All of it is read from what runs leave on the disk (fpn_ablate.runs.artifacts). A file that is missing or damaged is named in one
line, and the page goes without it. R rows, N images.
"""

import base64
import io
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fpn_ablate.report.collate.table import Row, Table
from fpn_ablate.report.formats import series
from fpn_ablate.utils.files import UNREADABLE, safe_name
from fpn_ablate.utils.paths import ARTIFACTS, DETECTIONS, PICTURES, TRUTH

SPREAD, EVEN, SHEET = 16, 8, 12  # images by greatest spread over the rows, spread evenly over the data, on the contact sheet
BEST, SCORE = 20, 0.5  # boxes shown: of proposals the best so many, of detections those of at least this score
ID = re.compile(r"-?\d{1,20}", re.ASCII)
PIXELS = 4_000_000  # of a small copy, far more than runs.artifacts makes
BYTES = 2_400_000  # of pictures, boxes and levels on one page, as text


@dataclass
class Album:
    """The pictures of one page, each embedded once, of all the data sets that its tables are about."""

    folders: dict[str, Path] = field(default_factory=dict)
    pictures: dict[str, dict[str, Any]] = field(default_factory=dict)
    spent: int = 0
    full: bool = False

    def spend(self, size: int) -> bool:
        """Whether there is room for so many bytes more, which are then taken; if not, the page stays without."""
        room = self.spent + size <= BYTES
        self.spent, self.full = self.spent + size * room, self.full or not room
        return room

    def add(self, name: str, image: str) -> str | None:
        """The key of a picture, or None where it cannot be read or the page is full."""
        key = f"{name}/{image}"
        if key not in self.pictures:
            try:
                picture = _picture(_inside(self.folders[name], f"{image}.jpg"), self.truth(name)["images"][image])
            except Exception:  # Pillow's decoders raise whatever they stumble on
                return None
            if self.spend(len(picture["src"]) + 400):
                self.pictures[key] = picture
        return key if key in self.pictures else None

    def truth(self, name: str) -> dict[str, Any]:
        """The ground truth of a set of pictures; without images where it cannot be read."""
        return self._truths.setdefault(name, _truth(self.folders.get(name)))

    @cached_property
    def _truths(self) -> dict[str, dict[str, Any]]:
        return {}


@dataclass(frozen=True)
class Exhibit:
    """One run: each image's own figure (`values`), its boxes, and the levels of its neck on the first image."""

    row: Row
    values: dict[str, float]
    boxes: dict[str, list[list[int]]]
    levels: dict[str, np.ndarray]
    detections: bool


@dataclass(frozen=True)
class Exhibits:
    """A table's runs of one seed; `missing` says what there is not, and why."""

    seed: int | None
    pictures: str
    runs: tuple[Exhibit, ...]
    missing: tuple[str, ...]


def exhibits(table: Table, album: Album) -> Exhibits:
    """What the runs of the smallest seed that most rows have leave to be seen."""
    rows = [row for row in series.finished_rows(table) if row.folders]
    counts = Counter(seed for row in rows for seed in row.seeds if (_folder(row, seed) / ARTIFACTS).is_file())
    if not counts:
        where = "no run has artifacts.npz (python -m fpn_ablate artifacts RUNS makes it)" if rows else "no folder of its runs"
        return Exhibits(None, "", (), (f"Pictures: {where} is on this disk.".replace("no run has", "no"),))
    seed = min(counts, key=lambda seed: (-counts[seed], seed))
    found, missing, names = [], [], Counter()
    for row in series.finished_rows(table):
        try:
            exhibit = _exhibit(row, _folder(row, seed))
            record = next(record for record in row.records if record["seed"] == seed)
            names[str(record["pictures"])] += 1
            found.append((str(record["pictures"]), exhibit))
            album.folders.setdefault(str(record["pictures"]), _folder(row, seed).resolve().parents[3] / PICTURES
                                     / safe_name(str(record["pictures"])))  # fmt: skip
        except (*UNREADABLE, StopIteration) as error:
            why = f"no file {Path(error.filename).name}" if isinstance(error, FileNotFoundError) else "damaged or incomplete"
            missing.append(f"{series.row_name(row)}, seed {seed}: {why}")
    name = names.most_common(1)[0][0] if names else ""
    missing += [f"{series.row_name(e.row)}, seed {seed}: evaluated on other pictures" for other, e in found if other != name]
    if name and not album.truth(name)["images"]:
        missing.append(f"the pictures: {name}/truth.json is missing or damaged")
    return Exhibits(seed, name, tuple(exhibit for other, exhibit in found if other == name), tuple(missing))


def gallery(shown: Exhibits, album: Album, colours: dict[str, int]) -> dict[str, Any] | None:
    """What the page's script draws the comparison from; None where fewer than two rows can be compared."""
    if len(shown.runs) < 2:
        return None
    known = album.truth(shown.pictures)["images"]
    chosen = choose([run.values for run in shown.runs], list(known))
    keys = {image: key for image in chosen if (key := album.add(shown.pictures, image))}
    if not keys:
        return None
    rows = [
        {
            **{"row": run.row.row, "label": series.row_name(run.row), "colour": colours[run.row.row]},
            "values": [_percent(run.values.get(image)) for image in keys],
            "boxes": [run.boxes.get(image, []) for image in keys],
        }
        for run in shown.runs
    ]
    detections = any(run.detections for run in shown.runs)
    boxes = f"detections of score ≥ {SCORE:g}" if detections else f"the best {BEST} proposals"
    found = {"metric": "AP" if detections else "AR@100", "boxes": boxes, "images": list(keys.values()), "rows": rows}
    return found if album.spend(len(json.dumps(found, separators=(",", ":")))) else None


def choose(values: list[dict[str, float]], images: list[str]) -> list[str]:
    """Images to show: those with the greatest spread over rows, some spread evenly, and a win for each row over each other
    where there is one.

    Args:
        values: R rows, {image: figure}, NaN or absent where there is none. images: those that there are pictures of.
    """
    table = np.array([[row.get(image, np.nan) for image in images] for row in values], dtype=float)
    known = np.flatnonzero(np.isfinite(table).all(axis=0))
    if not len(known):
        return []
    table = table[:, known]
    spread = table.max(axis=0) - table.min(axis=0)
    chosen = [int(i) for i in np.argsort(-spread, kind="stable")[:SPREAD]]
    chosen += [int(i) for i in np.linspace(0, len(known) - 1, min(EVEN, len(known))).round()]
    for first in table:
        for second in table:
            won = first - second
            if won.max() > 0 and not (won[chosen] > 0).any():
                chosen.append(int(won.argmax()))
    return [images[known[i]] for i in dict.fromkeys(chosen)]


def pyramid(shown: Exhibits, album: Album) -> dict[str, Any] | None:
    """The first image, and for each row its levels as (name, caption, address of a picture)."""
    rows = [(series.row_name(run.row), run.row.row, [_level(*level) for level in _in_order(run.levels)]) for run in shown.runs]
    rows = [row for row in rows if row[2]]
    if not rows or not album.spend(sum(len(level[2]) + 200 for _, _, levels in rows for level in levels)):
        return None
    first = next(iter(album.truth(shown.pictures)["images"]), None)
    return {"picture": first and album.add(shown.pictures, first), "rows": rows}


def sheets(album: Album) -> list[dict[str, Any]]:
    """For each data set twelve pictures, spread evenly over those that there are."""
    found = []
    for name in album.folders:
        truth = album.truth(name)
        images = list(truth["images"])
        places = sorted({round(i) for i in np.linspace(0, len(images) - 1, min(SHEET, len(images)))})
        keys = [key for place in places if (key := album.add(name, images[place]))]
        if keys:
            found.append({"name": name, "categories": truth["categories"], "pictures": keys})
    return found


def _folder(row: Row, seed: int) -> Path:
    return row.folders.get(seed, Path("/nonexistent"))


def _exhibit(row: Row, folder: Path) -> Exhibit:
    with np.load(folder / ARTIFACTS, allow_pickle=False) as content:
        values = {str(i): float(v) for i, v in zip(content["image_ids"], content["values"], strict=True)}
        levels = {name.removeprefix("level_"): content[name] for name in content.files if name.startswith("level_")}
    levels = {name: level for name, level in levels.items() if level.ndim == 2 and level.dtype == np.uint8 and level.size}
    with np.load(folder / DETECTIONS, allow_pickle=False) as content:
        ids, boxes, scores = content["image_ids"], content["boxes"].reshape(-1, 4), content["scores"]
        detections = "labels" in content.files
    kept: dict[str, list[list[int]]] = {}
    for k in np.argsort(-scores, kind="stable"):
        own = kept.setdefault(str(ids[k]), [])
        if scores[k] >= SCORE if detections else len(own) < BEST:
            own.append([*(int(side) for side in boxes[k].round()), round(100 * float(scores[k]))])
    return Exhibit(row, values, kept, levels, detections)


def _truth(folder: Path | None) -> dict[str, Any]:
    try:
        content = json.loads(_inside(folder, TRUTH).read_text(encoding="utf-8"))
        # The keys are ids of images, and parts of paths.
        images = {k: v for k, v in content["images"].items() if ID.fullmatch(k) and v["width"] > 0 and v["height"] > 0}
        return {"categories": [str(name) for name in content["categories"]], "images": images}
    except UNREADABLE:
        return {"categories": [], "images": {}}


def _inside(folder: Path, name: str) -> Path:
    """A file of a folder; ValueError where a link leads out of it: a page embeds what it finds."""
    file = (folder / name).resolve()
    if file.parent != folder.resolve():
        raise ValueError(f"{name} lies outside of {folder}")
    return file


def _picture(file: Path, truth: dict[str, Any]) -> dict[str, Any]:
    from PIL import Image

    buffer = io.BytesIO()
    if file.stat().st_size > BYTES:
        raise ValueError(f"{file}: no small copy of a picture")
    with Image.open(file, formats=("JPEG",)) as picture:
        if picture.width * picture.height > PIXELS:
            raise ValueError(f"{file}: no small copy of a picture")
        picture.convert("RGB").save(buffer, "WEBP", quality=72, method=2)
    names = Counter(str(item["category"]) for item in truth["objects"])
    alt = ", ".join(f"{count} {name}" for name, count in names.most_common()) or "no object"
    objects = [[*(round(float(side)) for side in item["bbox"]), str(item["category"]), bool(item.get("crowd"))]
               for item in truth["objects"]]  # fmt: skip
    size = {"width": int(truth["width"]), "height": int(truth["height"])}
    return {"src": _address("webp", buffer), **size, "truth": objects, "alt": f"image {file.stem}: {alt}"}


def _in_order(levels: dict[str, np.ndarray]) -> Iterable[tuple[str, np.ndarray]]:
    return sorted(levels.items(), key=lambda item: (item[0][:1], [int(part) for part in re.findall(r"\d+", item[0])]))


def _level(name: str, level: np.ndarray) -> tuple[str, str, str]:
    from matplotlib import colormaps
    from PIL import Image

    image = Image.fromarray(level)
    image.putpalette((colormaps["viridis"](np.arange(256))[:, :3] * 255).astype(np.uint8).tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    number = re.search(r"\d+", name)
    stride = f"stride {2 ** int(number[0])}, " if number and int(number[0]) < 12 else ""
    return name.upper(), f"{stride}{level.shape[1]} × {level.shape[0]}", _address("png", buffer)


def _address(kind: str, buffer: io.BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _percent(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else round(100 * value, 1)

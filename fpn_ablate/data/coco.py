"""Any detection set in COCO's instances format. G objects in an image, M in the set, K categories.

The annotation file is read once into arrays; pictures are read when asked for. Everything is checked on construction by
`doctor`, so that a training never meets a broken file after hours.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fpn_ablate.config.schema import Coco, Shapes
from fpn_ablate.data.checks import examine
from fpn_ablate.data.checks.annotations import Annotations
from fpn_ablate.data.checks.findings import BOX, BROKEN, Finding
from fpn_ablate.data.checks.images import read_rgb
from fpn_ablate.structures.batch import Sample
from fpn_ablate.utils.errors import UserError

log = logging.getLogger(__name__)


class CocoDataset:
    """A split of a COCO-format set: implements `sample.DetectionDataset`.

    invalid: what to do with boxes outside their image or without area: 'error' refuses the set; 'clip' cuts them to the
    image and drops what has no area left; 'drop' drops them. Broken structure and broken images are refused whatever it
    says. `repairs` counts what was changed. keep_empty=False leaves images without an object (crowd regions do not
    count) out of the samples, for training; `coco()` always declares them.

    Raises UserError with all kinds of problems, their number, the first ten, and the fixes.
    """

    area_bounds = (32.0**2, 96.0**2)

    def __init__(
        self,
        annotations: Path | str,
        images: Path | str,
        name: str,
        *,
        invalid: Literal["error", "clip", "drop"] = "error",
        keep_empty: bool = True,
    ) -> None:
        if invalid not in ("error", "clip", "drop"):
            raise UserError(f"invalid={invalid!r} is not known. Fix: one of 'error', 'clip', 'drop'")
        report = examine.examine(annotations, images)
        refused = report.at(BROKEN, BOX) if invalid == "error" else report.at(BROKEN)
        if refused or report.annotations is None:
            raise UserError(_refusal(name, report, refused))
        if "area-missing" in report.counts():
            log.warning("%s: annotations without `area` in %s; width x height of the box is used", name, annotations)
        self.name, self.generated = name, report.annotations.generated
        self.categories = report.annotations.categories
        self.label_of = {category["id"]: label for label, category in enumerate(self.categories, start=1)}
        self.category_of = {label: key for key, label in self.label_of.items()}
        self._root = os.path.realpath(images)
        self._table, self.repairs = repaired(report.annotations, invalid)
        # Objects in the order of their images: those of image n are [offsets[n], offsets[n + 1]).
        self._offsets = np.searchsorted(self._table.image_index, np.arange(len(self._table.image_ids) + 1))
        self._kept = self._with_objects() if not keep_empty else np.arange(len(self._table.image_ids))
        if left_out := len(self._table.image_ids) - len(self._kept):
            self.repairs["images without objects left out"] = left_out
        self.image_ids = self._table.image_ids[self._kept].tolist()
        self.sizes = self._table.sizes[self._kept]
        self.digest = _digest(self._table, report.file_bytes, {"invalid": invalid, "keep_empty": keep_empty})

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> Sample:
        """Sample `index` of `image_ids`. Raises UserError where the picture cannot be decoded."""
        n = self._kept[index]
        height, width = self._table.sizes[n].tolist()
        path = os.path.join(self._root, self._table.file_names[n])
        image_id = int(self._table.image_ids[n])
        try:
            pixels = read_rgb(path, width, height)
        except Exception as error:  # Pillow's decoders raise whatever they stumble on
            fix = "replace the file, or remove the image and its annotations from the JSON"
            raise UserError(f"{path}, image id {image_id}: cannot be read ({error}). Fix: {fix}") from error
        objects = slice(self._offsets[n], self._offsets[n + 1])
        boxes = self._table.boxes[objects].copy()
        boxes[:, 2:] += boxes[:, :2]
        boxes = np.clip(boxes, 0, [width, height, width, height]).astype(np.float32)
        return Sample(pixels, boxes, self._table.labels[objects].copy(), self._table.crowd[objects].copy(), image_id)

    @property
    def folders(self) -> list[str]:
        """Where its pictures lie, whether they are samples or not."""
        return sorted({os.path.dirname(os.path.join(self._root, name)) for name in self._table.file_names})

    def coco(self) -> dict[str, Any]:
        """All declared images with the objects as repaired, in native ids.

        Boxes that only rounding puts over the border stay as in the file, so that other evaluators agree. Annotation id
        0 is replaced: pycocotools takes it for "no match".
        """
        table = self._table
        sizes = zip(table.image_ids.tolist(), table.file_names, table.sizes.tolist(), strict=True)
        ids = np.where(table.ids == 0, table.ids.max(initial=0) + 1, table.ids)
        columns = (ids, table.image_ids[table.image_index], table.labels, table.boxes, table.areas, table.crowd)
        return {
            "images": [{"id": key, "file_name": name, "height": h, "width": w} for key, name, (h, w) in sizes],
            "categories": [dict(category) for category in self.categories],
            "annotations": [
                {
                    "id": key,
                    "image_id": image,
                    "category_id": self.category_of[label],
                    "bbox": box,
                    "area": area,
                    "iscrowd": int(crowd),
                }
                for key, image, label, box, area, crowd in zip(*(c.tolist() for c in columns), strict=True)
            ],
        }

    def _with_objects(self) -> np.ndarray:
        objects = self._table.image_index[~self._table.crowd]
        return np.flatnonzero(np.bincount(objects, minlength=len(self._table.image_ids)))


def load(cfg: Any) -> tuple[CocoDataset, CocoDataset]:
    """The training and the evaluation split of a `data=coco` configuration (conf/data/coco.yaml).

    Evaluation keeps images without objects whatever `keep_empty` says. Raises UserError on a missing root or category
    lists that differ.
    """
    train, val = _split(cfg, cfg.train, cfg.keep_empty), load_val(cfg)
    if reason := unfit(cfg, train._table, val._table):
        raise UserError(reason)
    return train, val


def load_val(cfg: Any) -> CocoDataset:
    """The evaluation split alone."""
    return _split(cfg, cfg.val, keep_empty=True)


def _split(cfg: Any, split: Any, keep_empty: bool) -> CocoDataset:
    root = root_of(cfg)
    name = cfg.label or root.resolve().name
    return CocoDataset(root / split.annotations, root / split.images, name, invalid=cfg.invalid, keep_empty=keep_empty)


def root_of(cfg: Any) -> Path:
    """The folder `data.root`; UserError where there is none."""
    root = Path(cfg.root).expanduser()
    if not root.is_dir():
        raise UserError(f"data.root={cfg.root} is not a folder. Fix: data.root=PATH of the folder with annotations and images")
    return root


def unfit(cfg: Any, train: Annotations, val: Annotations) -> str | None:
    """Why two splits, each of them sound, cannot be trained on and evaluated together; None where they can."""
    if train.categories != val.categories:
        differing = [c for c in (*train.categories, *val.categories) if (c in train.categories) != (c in val.categories)]
        return (
            f"{cfg.train.annotations} and {cfg.val.annotations} below {root_of(cfg)} declare different categories: {differing}"
            ". Fix: the same `categories` in both files, used or not"
        )
    if train.crowd.all():
        return f"{cfg.train.annotations} below {root_of(cfg)} has no object to learn from. Fix: annotations that are not crowd"
    return None


def _refusal(name: str, report: examine.Report, refused: list[Finding]) -> str:
    again = f"python -m fpn_ablate doctor {report.annotations_file} {report.image_folder} --limit 0"
    count = sum(finding.count for finding in refused)
    head = f"{name}: {count} problems in {report.annotations_file} with images {report.image_folder}"
    return f"{head}: {examine.summary(refused, 10)}\nThe whole list: {again}"


def repaired(table: Annotations, invalid: str) -> tuple[Annotations, dict[str, int]]:
    """The table in the order of images, its bad boxes clipped or dropped, and how many of each."""
    kinds = examine.box_kinds(table)
    boxes, areas = table.boxes, table.areas
    drop = kinds["box-empty"] | kinds["box-outside"]
    clip = np.zeros_like(drop)
    if invalid == "clip":
        cut = examine.clipped(table)
        clip = kinds["box-outside"] & ~examine.is_empty(cut)
        boxes = np.where(clip[:, None], cut, boxes)
        areas = np.where(clip, np.minimum(areas, boxes[:, 2] * boxes[:, 3]), areas)
        drop &= ~clip
    order = np.argsort(table.image_index, kind="stable")
    order = order[~drop[order]]
    columns = (c[order] for c in (table.ids, table.image_index, table.labels, boxes, areas, table.crowd))
    counts = {"boxes clipped by up to 1 px": kinds["box-rounded"], "boxes clipped": clip, "boxes dropped": drop}
    kept = Annotations(table.categories, table.image_ids, table.file_names, table.sizes, *columns)
    return kept, {what: int(mask.sum()) for what, mask in counts.items() if mask.any()}


def _digest(table: Annotations, file_bytes: np.ndarray | None, settings: dict[str, Any]) -> str:
    """sha256 over settings, categories, images (name, size, bytes) and objects; where the set lies does not matter."""
    sha = hashlib.sha256(json.dumps([settings, table.categories, table.file_names], sort_keys=True).encode())
    arrays = (table.image_ids, table.sizes, file_bytes, table.ids, table.image_index, table.labels, table.boxes)
    for array in (*arrays, table.areas, table.crowd):
        sha.update(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes())
    return sha.hexdigest()


def files_of_sets(data: Shapes | Coco, training: Any, validation: Any) -> Iterator[Path | str]:
    """Yield the annotation files of COCO-format splits and the folders of their pictures; nothing for generated data.

    `training` may be `validation` itself, where nothing is trained.
    """
    if isinstance(data, Coco):
        splits = {"train": training, "val": validation} if training is not validation else {"val": validation}
        for name, dataset in splits.items():
            yield root_of(data) / getattr(data, name).annotations
            yield from dataset.folders

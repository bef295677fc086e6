"""Read any detection set in COCO's instances format. G objects in an image, M in the set, K categories.

The annotation file is parsed once, into arrays; pictures are read on demand. The constructor checks all files
(`checks.examine`), so that a training does not meet a broken one after hours.
"""

import hashlib
import itertools
import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fpn_ablate.config.schema import Coco, Split
from fpn_ablate.data.checks import examine
from fpn_ablate.data.checks.annotations import Annotations
from fpn_ablate.data.checks.findings import BOX, KINDS, NOTE, Finding
from fpn_ablate.data.checks.images import read_rgb
from fpn_ablate.structures.batch import Sample
from fpn_ablate.utils import rle
from fpn_ablate.utils.content import CONTENT, WHOLE, content_digest
from fpn_ablate.utils.errors import UserError

log = logging.getLogger(__name__)


class CocoDataset:
    """A split of a COCO-format set: implements `structures.batch.DetectionDataset`.

    Args:
        invalid: what to do with boxes and masks outside their image or without area. 'error' refuses the set; 'clip' cuts them
            to the image and drops objects without area left; 'drop' drops the objects. Broken structure and broken images are
            always refused.
        keep_empty: False leaves images without an object (crowd regions do not count) out of the samples, for training;
            `coco()` always declares them.
        links: follow links out of the folder `images`.
        masks: read the objects' masks too, and check them.

    Attributes:
        repairs: how many entries were changed and how many images left out, by kind.
        hashed: what of the pictures `digest` holds, `content.CONTENT` or `content.SAMPLES`.

    Raises:
        UserError: the set has problems; the message counts them by kind and lists the first ten with their fixes.
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
        links: bool = False,
        masks: bool = False,
    ) -> None:
        report = examine.examine(annotations, images, links, masks)
        refused = report.refused(invalid)
        if refused or report.annotations is None:
            raise UserError(_refusal(name, report, refused))
        for finding in report.at(NOTE):
            if finding.annotation_id is None:  # of the whole file
                log.warning("%s: %s", name, finding)
        self.name, self.generated, self.has_masks = name, report.annotations.generated, masks
        self.categories = report.annotations.categories
        self.label_of = {category["id"]: label for label, category in enumerate(self.categories, start=1)}
        self._annotations, self._root = os.path.abspath(annotations), os.path.realpath(images)
        self._table, self.repairs = repaired(report.annotations, invalid)
        # Objects in the order of their images: those of image n are [offsets[n], offsets[n + 1]).
        self._offsets = np.searchsorted(self._table.image_index, np.arange(len(self._table.image_ids) + 1))
        # Positions of the samples among all declared images.
        self._samples = np.flatnonzero(self._table.used_images(keep_empty))
        if left_out := len(self._table.image_ids) - len(self._samples):
            self.repairs["images without objects left out"] = left_out
        self.image_ids = self._table.image_ids[self._samples].tolist()
        self.sizes = self._table.sizes[self._samples]
        pictures, self.hashed = content_digest([os.path.join(self._root, file) for file in self._table.file_names], name)
        if self.hashed != CONTENT:
            log.warning("%s: more than %d GiB; its identity holds %s of %s", name, WHOLE >> 30, self.hashed, images)
        settings = {"invalid": invalid, "keep_empty": keep_empty, "pictures": pictures}
        self.box_digest = _digest(replace(self._table, masks=None, mask_flaws=None), settings)
        self.digest = _digest(self._table, settings) if self.has_masks else self.box_digest

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> Sample:
        """Return the sample of image `image_ids[index]`.

        Raises:
            UserError: its picture cannot be decoded.
        """
        n = self._samples[index]
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
        masks = None if self._table.masks is None else self._table.masks[objects].tolist()
        labels, crowd = self._table.labels[objects].copy(), self._table.crowd[objects].copy()
        return Sample(pixels, boxes, labels, crowd, image_id, masks=masks)

    @property
    def files(self) -> list[str]:
        """Return the paths of the annotation file and of the folders of all declared pictures."""
        folders = {os.path.dirname(os.path.join(self._root, name)) for name in self._table.file_names}
        return [self._annotations, *sorted(folders)]

    def coco(self) -> dict[str, Any]:
        """Return all declared images with their repaired objects as a COCO instances dictionary, in native ids.

        A box that crosses the border by rounding alone stays as in the file, so that other evaluators agree.
        """
        table = self._table
        sizes = zip(table.image_ids.tolist(), table.file_names, table.sizes.tolist(), strict=True)
        category_ids = np.array([category["id"] for category in self.categories])
        columns = {
            "id": _numbered(table.ids),
            "image_id": table.image_ids[table.image_index],
            "category_id": category_ids[table.labels - 1],
            "bbox": table.boxes,
            "area": table.areas,
            "iscrowd": table.crowd.astype(int),
        }
        if table.masks is not None:
            objects = zip(table.masks, table.sizes[table.image_index].tolist(), strict=True)
            columns["segmentation"] = np.array([rle.coco_object(mask, size) for mask, size in objects], object)
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        return {
            "images": [{"id": key, "file_name": name, "height": h, "width": w} for key, name, (h, w) in sizes],
            "categories": [dict(category) for category in self.categories],
            "annotations": [dict(zip(columns, row, strict=True)) for row in rows],
        }


def load(cfg: Coco, eval_images: int | None = None, masks: bool = False) -> tuple[CocoDataset, CocoDataset]:
    """Load the training and the evaluation split of a `data=coco` configuration (conf/data/coco.yaml).

    The evaluation split keeps images without objects, whatever `keep_empty` says.

    Args:
        eval_images: the first images are evaluated; None: all.
        masks: read the objects' masks.

    Raises:
        UserError: there is no such folder, a split has problems, or the two do not go together.
    """
    train, val = _split(cfg, cfg.train, cfg.keep_empty, masks), load_val(cfg, eval_images, masks)
    if reason := unfit(cfg, train._table, val._table):
        raise UserError(reason)
    return train, val


def load_val(cfg: Coco, eval_images: int | None = None, masks: bool = False) -> CocoDataset:
    """Load the evaluation split alone; the arguments and errors are those of `load`."""
    val = _split(cfg, cfg.val, True, masks)
    if reason := unfit_to_evaluate(cfg, val._table, eval_images):
        raise UserError(reason)
    return val


def _split(cfg: Coco, split: Split, keep_empty: bool, masks: bool) -> CocoDataset:
    root = root_of(cfg)
    name = cfg.label or root.resolve().name
    settings = {"invalid": cfg.invalid, "keep_empty": keep_empty, "links": cfg.links, "masks": masks}
    return CocoDataset(root / split.annotations, root / split.images, name, **settings)


def root_of(cfg: Coco) -> Path:
    """Return the folder `data.root`.

    Raises:
        UserError: it is not a folder.
    """
    root = Path(cfg.root).expanduser()
    if not root.is_dir():
        raise UserError(f"data.root={cfg.root} is not a folder. Fix: give the folder that holds annotations and images")
    return root


def unfit(cfg: Coco, train: Annotations, val: Annotations) -> str | None:
    """Return why two sound splits cannot be trained on and evaluated together; None if they can."""
    if train.categories != val.categories:
        different = [c for c in (*train.categories, *val.categories) if (c in train.categories) != (c in val.categories)]
        return (
            f"{cfg.train.annotations} and {cfg.val.annotations} below {root_of(cfg)} declare different categories: {different}"
            ". Fix: write the same `categories` to both files, used or not"
        )
    if train.crowd.all():
        return f"{cfg.train.annotations} below {root_of(cfg)} has no object to learn from. Fix: add objects that are no crowd"
    return None


def unfit_to_evaluate(cfg: Coco, val: Annotations, eval_images: int | None) -> str | None:
    """Return why nothing can be measured on a sound split; None if it can."""
    where, end = f"{cfg.val.annotations} below {root_of(cfg)}", eval_images or len(val.image_ids)
    if val.crowd.all():
        return f"{where} has no object to evaluate. Fix: add objects that are no crowd, or choose another data.val.annotations"
    if not (~val.crowd & (val.image_index < end)).any():
        return f"{where} has no object to evaluate in its first {end} images. Fix: raise recipe.eval_images"
    return None


def _refusal(name: str, report: examine.Report, refused: list[Finding]) -> str:
    options = " --links" * report.links + " --masks" * report.masks
    command = f"python -m fpn_ablate doctor {report.annotations_file} {report.image_folder} --limit 0{options}"
    count = sum(finding.count for finding in refused)
    head = f"{name}: {count} problems in {report.annotations_file} with images {report.image_folder}"
    return f"{head}: {examine.summary(refused, 10)}\nThe whole list: {command}"


def repaired(table: Annotations, invalid: str) -> tuple[Annotations, dict[str, int]]:
    """Clip or drop the bad boxes and masks of a table, and put its objects in the order of their images.

    Returns:
        The table, and how many entries were changed, by kind.
    """
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
    changed = {"boxes clipped by up to 1 px": kinds["box-rounded"], "boxes clipped": clip, "boxes dropped": drop}
    if table.masks is not None:
        changed |= _mask_changes(table, invalid, drop)
        drop = drop | changed["objects dropped for their masks"]
        cut = np.flatnonzero(changed["masks clipped"])
        areas = areas.copy()
        areas[cut] = rle.areas_of(table.masks[cut], table.sizes[table.image_index[cut]])
    order = np.argsort(table.image_index, kind="stable")
    result = replace(table, boxes=boxes, areas=areas).select(order[~drop[order]])
    return result, table.changes | {change: int(rows.sum()) for change, rows in changed.items() if rows.any()}


def _mask_changes(table: Annotations, invalid: str, dropped: np.ndarray) -> dict[str, np.ndarray]:
    """Return (M,) bool for each way in which masks change; `dropped`: the objects that are gone for their boxes."""
    levels = np.array([KINDS[kind][0] if kind else NOTE for kind in table.mask_flaws.tolist()], object)
    usable = np.array([bool(mask) for mask in table.masks], bool) & (invalid == "clip")
    repairable = (levels == BOX) & ~dropped
    return {
        "masks clipped by up to 1 px": (table.mask_flaws == "mask-rounded") & ~dropped,
        "masks clipped": repairable & usable,
        "objects dropped for their masks": repairable & ~usable,
    }


def _numbered(ids: np.ndarray) -> np.ndarray:
    """Replace ids that are 0 (pycocotools takes it for "no match") or repeated by unused ones."""
    keep = np.isin(np.arange(len(ids)), np.unique(ids, return_index=True)[1]) & (ids != 0)
    used = set(ids[keep].tolist())
    fresh, result = itertools.filterfalse(used.__contains__, itertools.count(1)), ids.copy()
    result[~keep] = list(itertools.islice(fresh, int((~keep).sum())))
    return result


def _digest(table: Annotations, settings: dict[str, Any]) -> str:
    """Return the sha256 of settings (with the pictures' digest), categories, images and objects, with their masks where they
    are read, but not of the location."""
    sha = hashlib.sha256(json.dumps([settings, table.categories, table.file_names], sort_keys=True).encode())
    arrays = (table.image_ids, table.sizes, table.ids, table.image_index, table.labels, table.boxes)
    for array in (*arrays, table.areas, table.crowd):
        sha.update(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes())
    if table.masks is not None:
        for array in rle.join(table.masks.tolist()):
            sha.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
    return sha.hexdigest()

"""What a user needs to know of a data set before a sweep: python -m fpn_ablate doctor data=coco data.root=PATH ...

Both splits as the run would see them. `examine` gives all of it as one dictionary, which `--json` writes:

    format          1; raised when a key changes its meaning
    data, generated, invalid, keep_empty      what was examined, and how bad boxes and empty images are treated
    recipe          {name, short_side, max_side}
    sound           whether a run would start
    refused         reasons that lie in neither split alone
    warnings        [{kind, split, text}]: nothing for which a run is refused; `split` is train, val or null (both)
    splits          {train, val}: null values where the annotation file cannot be read
      annotations, image_folder    paths; null for generated pictures
      findings      [{kind, level, refused, file, image_id, annotation_id, value, count, fix}], as data/findings.py names them
      repairs       {what: how many} boxes that data.invalid changes
      images, images_used, images_without_objects, objects, crowd, crowd_share
      objects_an_image    {mean, median, max, above_100}
      sizes         native and input: {bounds, small, medium, large, sqrt_area}; aspect_ratio (height / width),
                    below_one_pixel, below_finest_stride, finest_stride: of the input. Quantiles are min, q05, ... q95, max.
      categories    [{id, name, objects, images}], imbalance: most frequent / rarest that has objects
      duplicates    {annotations, annotation_ids, file_names, shared_file_names}
    shared_images   {by_name_and_size: [{file_name, train, val}], by_content: [{train, val}]}, ids of images in both splits
    anchors         row of conf/ablation -> {levels, ratios, recall}: of the validation objects at the recipe's input size,
                    recall[all | small | medium | large] = {objects, iou50, iou70, mean_best_iou}: the share whose best anchor
                    has at least that IoU; by native size, as AR and AP of tables; null shares where there is no object

Objects are annotations that are not crowd. Only `sound` decides the exit code.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fpn_ablate.config.composition import data_name
from fpn_ablate.config.schema import Coco, Config
from fpn_ablate.data.transforms import Resize
from fpn_ablate.doctor import facts
from fpn_ablate.doctor.recall import Anchors, anchors_of, best_iou, input_sizes
from fpn_ablate.doctor.splits import Split, splits_of
from fpn_ablate.evaluation.coco import AREAS

FORMAT = 1


def examine(cells: Mapping[str, Config]) -> dict[str, Any]:
    """The facts on the data that these rows (name -> configuration, equal but for the neck) share.

    Raises:
        UserError: data.root is no folder.
    """
    cfg = next(iter(cells.values()))
    splits, reasons = splits_of(cfg)
    anchors = {row: anchors_of(cell) for row, cell in cells.items()}
    finest = min(stride for levels, _ in anchors.values() for stride, _ in levels)
    is_coco = isinstance(cfg.data, Coco)
    report = {
        "format": FORMAT,
        "data": data_name(cfg),
        "generated": any(split.table is not None and split.table.generated for split in splits),
        "invalid": cfg.data.invalid if is_coco else None,
        "keep_empty": cfg.data.keep_empty if is_coco else None,
        "recipe": {"name": cfg.recipe.name, "short_side": cfg.recipe.short_side, "max_side": cfg.recipe.max_side},
        "sound": not reasons and not any(split.refused for split in splits),
        "refused": reasons,
        "splits": {split.name: _split_facts(split, cfg, finest) for split in splits},
        "shared_images": None,
        "anchors": {},
    }
    train, val = splits
    # Generated pictures of the two splits are drawn from seeds of their own.
    if is_coco and train.table is not None and val.table is not None:
        report["shared_images"] = facts.shared_images(train, val)
    if val.table is not None:
        report["anchors"] = _recalls(val, cfg, anchors)
    report["warnings"] = list(_warnings(report))
    return report


def _split_facts(split: Split, cfg: Config, finest_stride: int) -> dict[str, Any]:
    refused = set(map(id, split.refused))
    found = [vars(f) | {"level": f.level, "refused": id(f) in refused, "fix": f.fix} for f in split.findings]
    head = {"annotations": split.file, "image_folder": split.folder, "findings": found, "repairs": split.repairs}
    if split.table is None:
        return head | dict.fromkeys(("images", "objects", "sizes", "categories", "imbalance", "duplicates"))
    table, categories = split.table, facts.categories_of(split.table)
    sizes = input_sizes(table.sizes, Resize.of(cfg.recipe))
    return {
        **head,
        **facts.images_of(split),
        "sizes": facts.sizes_of(table, sizes, split.bounds, finest_stride),
        "categories": categories,
        "imbalance": facts.imbalance(categories),
        "duplicates": facts.duplicates_of(table),
    }


def _recalls(val: Split, cfg: Config, rows: Mapping[str, Anchors]) -> dict[str, Any]:
    table = val.table
    assert table is not None
    objects = facts.objects_of(table)
    sizes = input_sizes(table.sizes, Resize.of(cfg.recipe))
    boxes = torch.from_numpy(facts.input_boxes(table, sizes)[objects])
    images = torch.from_numpy(sizes[table.image_index[objects]])
    names = facts.size_names(table.areas[objects], val.bounds)
    best = {what: best_iou(boxes, images, what).numpy() for what in dict.fromkeys(rows.values())}
    return {
        row: {
            "levels": [{"stride": stride, "anchor_sizes": list(sides)} for stride, sides in what[0]],
            "ratios": list(what[1]),
            "recall": {
                "all": _recall(best[what]),
                **{area: _recall(best[what][names == k]) for k, area in enumerate(AREAS[1:])},
            },
        }
        for row, what in rows.items()
    }


def _recall(best: np.ndarray) -> dict[str, Any]:
    if not len(best):
        return {"objects": 0, "iou50": None, "iou70": None, "mean_best_iou": None}
    shares = {f"iou{round(100 * t)}": round(float((best >= t).mean()), 6) for t in (0.5, 0.7)}
    return {"objects": len(best), **shares, "mean_best_iou": round(float(best.mean(dtype=np.float64)), 6)}


def _warnings(report: dict[str, Any]) -> Sequence[dict[str, Any]]:
    found: list[tuple[str, str | None, str]] = []
    for name, split in report["splits"].items():
        if split["images"] is not None:
            found += [(kind, name, text) for kind, text in _split_warnings(split)]
    if shared := report["shared_images"]:
        by_content, by_name = shared["by_content"], shared["by_name_and_size"]
        if by_content:
            ids = facts.named(f"{pair['train']} = {pair['val']}" for pair in by_content)
            text = f"images of val that are in train too, byte for byte: {len(by_content)} (ids train = val: {ids})"
            found.append(("shared-content", None, f"{text}: scores would be too good; take them out of one split"))
        # What has the same bytes has been said.
        others = [pair for pair in by_name if {k: pair[k] for k in ("train", "val")} not in by_content]
        if others:
            names = facts.named(pair["file_name"] for pair in others)
            text = f"file names with the same size in both splits, but with other bytes: {len(others)} ({names})"
            found.append(("shared-name", None, f"{text}; are they other versions of the same pictures?"))
    for area in AREAS[1:]:
        poor: dict[float, list[str]] = {}  # rows of the same anchors share a line
        for row, anchors in report["anchors"].items():
            recall = anchors["recall"][area]
            if recall["objects"] and recall["iou50"] < 0.5:
                poor.setdefault(recall["iou50"], []).append(row)
        for share, rows in poor.items():
            text = f"{share:.0%} of the {area} objects have an anchor with IoU >= 0.5 in {', '.join(rows)}"
            found.append(
                (
                    "anchors",
                    "val",
                    f"{text}; a larger recipe.short_side, other rpn.anchor_sizes or a row of finer stride helps",
                )
            )
    return [{"kind": kind, "split": split, "text": text} for kind, split, text in found]


def _split_warnings(split: dict[str, Any]) -> list[tuple[str, str]]:
    found = []
    if missing := [category["name"] for category in split["categories"] if not category["objects"]]:
        found.append(("category-without-objects", f"categories without an object: {facts.named(missing)}"))
    duplicates, crowded = split["duplicates"], split["objects_an_image"]
    if ids := duplicates["annotation_ids"]:
        text = f"annotations that repeat image, category and box of another: {len(ids)} (ids {facts.named(ids)})"
        found.append(("duplicate-annotations", f"{text}; one of each can be found at most: remove the others"))
    if names := duplicates["shared_file_names"]:
        found.append(("duplicate-file-names", f"file names that several images have: {len(names)} ({facts.named(names)})"))
    if above := crowded[f"above_{facts.DETECTIONS}"]:
        text = f"images with more than {facts.DETECTIONS} objects: {above} (the fullest has {crowded['max']})"
        found.append(("crowded", f"{text}: AR100, and AP of one category, cannot count all of them"))
    sizes = split["sizes"]
    if tiny := sizes["below_one_pixel"]:
        text = f"objects less than a pixel high or wide in the input: {tiny}"
        found.append(("below-one-pixel", f"{text}: they cannot be seen; raise recipe.short_side, or take them out"))
    if tiny := sizes["below_finest_stride"]:
        text = f"objects smaller in the input than a cell of the finest level ({sizes['finest_stride']} pixels): {tiny}"
        found.append(("below-finest-stride", f"{text}; a larger recipe.short_side helps"))
    return found
